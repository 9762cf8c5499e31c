"""Table of the audit trail, on SQLite and PostgreSQL: rows stay as they were written."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.jobs.audit import DAY_MILLISECONDS, AuditEntry, AuditTrail, table
from app.jobs.database import connect
from app.settings import MIN_AUDIT_DAYS

ENTRY = AuditEntry("token:gateway", "send", "202", "0123456789abcdef-0123456789abcdef", "10.0.0.7")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        f"sqlite:///{tmp_path}/jobs.sqlite" if request.param == "sqlite" else str(request.getfixturevalue("database"))
    )


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    engine = connect(url)
    AuditTrail(engine).create_tables()
    yield engine
    with engine.begin() as connection:
        connection.execute(sa.schema.DropTable(table))
    engine.dispose()


def write_old(engine: sa.Engine, days: float) -> None:
    with engine.begin() as connection:
        values = {"time": round(time.time() * 1000 - days * DAY_MILLISECONDS), "actor": "old"}
        connection.execute(table.insert().values(action="send", outcome="202", **values))


def test_rows_are_read_in_order_and_after_an_id(engine: sa.Engine) -> None:
    trail = AuditTrail(engine)
    trail.create_tables()  # a second time changes nothing
    before = time.time()
    for number in range(5):
        trail.write(AuditEntry(f"token:{number}", "list", "200"))
    rows = trail.read()
    assert [row.actor for row in rows] == [f"token:{number}" for number in range(5)]
    assert [row.actor for row in trail.read(rows[2].id)] == ["token:3", "token:4"]
    assert [row.id for row in trail.read_all()] == [row.id for row in rows]
    assert trail.read(limit=2) == rows[:2]
    assert rows[0].time[:16] == time.strftime("%Y-%m-%dT%H:%M", time.gmtime(before))
    assert rows[0].time.endswith("+00:00")


@pytest.mark.parametrize("statement", ["UPDATE counterpart_audit SET actor = 'x'", "DELETE FROM counterpart_audit"])
def test_database_refuses_to_change_or_delete_a_row(engine: sa.Engine, statement: str) -> None:
    trail = AuditTrail(engine)
    trail.write(ENTRY)
    before = trail.read()
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
        connection.exec_driver_sql(statement)
    assert trail.read() == before


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_postgresql_refuses_to_truncate(engine: sa.Engine) -> None:
    AuditTrail(engine).write(ENTRY)
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE counterpart_audit")
    assert len(AuditTrail(engine).read()) == 1


def test_only_old_rows_are_deleted_and_never_younger_ones(engine: sa.Engine) -> None:
    trail = AuditTrail(engine)
    for days in (MIN_AUDIT_DAYS - 1, MIN_AUDIT_DAYS + 2, 100):
        write_old(engine, days)
    last = trail.read()[-1].id
    assert trail.delete_expired(0) == 0
    assert trail.delete_expired(90) == 1
    assert trail.delete_expired(1) == 1
    assert len(trail.read()) == 1
    trail.write(ENTRY)
    assert trail.read()[-1].id > last


def test_parallel_writers_lose_no_row_and_commit_in_order(engine: sa.Engine) -> None:
    """A reader that continues after the last id must see each row once."""
    trail, done = AuditTrail(engine), threading.Event()
    seen: list[int] = []

    def follow() -> None:
        while not done.is_set():
            seen.extend(row.id for row in trail.read(seen[-1] if seen else 0))

    reader = threading.Thread(target=follow)
    reader.start()

    def write() -> None:
        for _ in range(25):
            trail.write(ENTRY)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    time.sleep(0.2)
    done.set()
    reader.join()
    assert seen == [row.id for row in trail.read_all()]
    assert len(seen) == 100


def test_tables_may_be_created_by_several_processes_at_once(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.schema.DropTable(table))
    errors: list[BaseException] = []

    def create() -> None:
        try:
            AuditTrail(engine).create_tables()
        except sa.exc.SQLAlchemyError as error:
            errors.append(error)

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
