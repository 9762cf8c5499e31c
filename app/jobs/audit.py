"""Audit trail: who did what with which job, when, from where, and with which outcome.

The rows contain no patient data, no file names and no query strings. Triggers of the database refuse to change a row,
and to delete one that is younger than `MIN_AUDIT_DAYS`. Erasing a scan keeps its rows.
"""

import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

import sqlalchemy as sa

from app.settings import MIN_AUDIT_DAYS

Action = Literal[
    "send", "list", "show", "follow", "download", "review", "cancel", "erase",
    "login", "logout", "refuse", "export", "retry", "deliver",
]  # fmt: skip
# Outcome of the row before an action that changes something.
BEGUN = "begun"
PAGE_ROWS = 1000
# Writers on PostgreSQL take turns, so that a reader who continues after an id misses no row that commits later.
ADVISORY_LOCK = 0x436F756E746572
DAY_MILLISECONDS = 86_400_000

metadata = sa.MetaData()
table = sa.Table(
    "counterpart_audit",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("time", sa.BigInteger, nullable=False),  # milliseconds since the epoch
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("job", sa.Text),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("address", sa.Text),
    sqlite_autoincrement=True,  # an id is never used twice
)

SQLITE_TRIGGERS = (
    """CREATE TRIGGER IF NOT EXISTS counterpart_audit_update BEFORE UPDATE ON counterpart_audit
    BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END""",
    f"""CREATE TRIGGER IF NOT EXISTS counterpart_audit_delete BEFORE DELETE ON counterpart_audit
    WHEN OLD.time > (CAST(strftime('%s', 'now') AS INTEGER) - {MIN_AUDIT_DAYS * 86_400}) * 1000
    BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END""",
)
POSTGRESQL_TRIGGERS = (
    f"""CREATE OR REPLACE FUNCTION counterpart_audit_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF TG_OP = 'DELETE' THEN
        IF OLD.time <= (extract(epoch FROM now()) - {MIN_AUDIT_DAYS * 86_400}) * 1000 THEN RETURN OLD; END IF;
    END IF;
    RAISE EXCEPTION 'the audit trail is append-only'; END $$""",
    "DROP TRIGGER IF EXISTS counterpart_audit_row ON counterpart_audit",
    """CREATE TRIGGER counterpart_audit_row BEFORE UPDATE OR DELETE ON counterpart_audit
    FOR EACH ROW EXECUTE FUNCTION counterpart_audit_refuse()""",
    "DROP TRIGGER IF EXISTS counterpart_audit_all ON counterpart_audit",
    """CREATE TRIGGER counterpart_audit_all BEFORE TRUNCATE ON counterpart_audit
    FOR EACH STATEMENT EXECUTE FUNCTION counterpart_audit_refuse()""",
)


@dataclass(frozen=True)
class AuditEntry:
    """An event.

    Attributes
    ----------
    actor : str
        `app.api.identity.Principal.actor`, "dicom:" and an AE title, "service", or "unknown".
    action : str
    outcome : str
        Status of the response, "begun", "accepted" (a series that became a job), or the outcome of a delivery.
    job : str or None
    address : str or None
        Address of the client, or of the target of a delivery.
    """

    actor: str
    action: Action
    outcome: str
    job: str | None = None
    address: str | None = None


@dataclass(frozen=True)
class AuditRow(AuditEntry):
    """A row of the trail, with its number and its time in UTC."""

    id: int = 0
    time: str = ""

    def to_line(self) -> str:
        """Return the row as a line of JSON."""
        fields = asdict(self)
        return json.dumps({column.name: fields[column.name] for column in table.columns}) + "\n"


class AuditTrail:
    """The table of events. Every method blocks.

    Parameters
    ----------
    database : sqlalchemy.Engine
    """

    def __init__(self, database: sa.Engine) -> None:
        self._database = database

    def create_tables(self) -> None:
        """Create the table and its triggers if they do not exist. Several processes may do this at once."""
        triggers = POSTGRESQL_TRIGGERS if self._database.dialect.name == "postgresql" else SQLITE_TRIGGERS
        with self._database.begin() as connection:
            self._take_turn(connection)
            connection.execute(sa.schema.CreateTable(table, if_not_exists=True))
            for statement in triggers:
                connection.exec_driver_sql(statement)

    def write(self, entry: AuditEntry) -> None:
        """Append a row. When this returns, the row is committed."""
        values = asdict(entry) | {"time": round(time.time() * 1000)}
        with self._database.begin() as connection:
            self._take_turn(connection)
            connection.execute(table.insert().values(values))

    def read(self, after: int = 0, limit: int = PAGE_ROWS) -> list[AuditRow]:
        """Return the rows with a larger id than `after`, in order."""
        query = sa.select(table).where(table.c.id > after).order_by(table.c.id).limit(limit)
        with self._database.connect() as connection:
            return [_to_row(row) for row in connection.execute(query)]

    def read_all(self, after: int = 0) -> Iterator[AuditRow]:
        """Yield all rows with a larger id than `after`, one page at a time."""
        while page := self.read(after):
            yield from page
            after = page[-1].id

    def delete_expired(self, keep_days: float) -> int:
        """Delete rows that are older than this and than `MIN_AUDIT_DAYS`, and return their number. 0 keeps all."""
        if not keep_days:
            return 0
        # An hour more than the triggers require, because the clock of the database may differ.
        age = max(keep_days, MIN_AUDIT_DAYS) * DAY_MILLISECONDS + 3_600_000
        with self._database.begin() as connection:
            return connection.execute(table.delete().where(table.c.time < time.time() * 1000 - age)).rowcount

    def _take_turn(self, connection: sa.Connection) -> None:
        if self._database.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))


def is_disk_full(error: BaseException) -> bool:
    """Return whether a database error means that the disk is full."""
    cause = getattr(error, "orig", None)
    if isinstance(cause, sqlite3.OperationalError):
        return cause.sqlite_errorcode == sqlite3.SQLITE_FULL
    return getattr(cause, "sqlstate", None) == "53100"


def _to_row(row: sa.Row[tuple[object, ...]]) -> AuditRow:
    fields = dict(row._mapping)
    moment = datetime.fromtimestamp(fields.pop("time") / 1000, UTC)
    return AuditRow(**fields, time=moment.isoformat(timespec="milliseconds"))
