"""Database connection beside that of DBOS, for queries that DBOS has no call for."""

import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from app.errors import DatabaseUnavailable

# Longest time that truncating the log waits for readers, in milliseconds.
TRUNCATE_TIMEOUT = 100
# Seconds for a connection, and for a free one of the pool. `connect_timeout` of the URL takes precedence.
CONNECT_SECONDS = 3
POOL_SECONDS = 5
# Seconds for `check_database`.
CHECK_SECONDS = 4.0

T = TypeVar("T")


def run_within(seconds: float, function: Callable[[], T]) -> T:
    """Return the result of a function, or raise its exception.

    Raises
    ------
    TimeoutError
        The function takes longer. Its thread continues, and it does not delay the end of the process.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


def check_database(database_url: str) -> None:
    """Check that the database answers, and that the file of a SQLite database is sound. No file is created.

    Raises
    ------
    DatabaseUnavailable
    """
    try:
        run_within(CHECK_SECONDS, lambda: _check(database_url))
    except DatabaseUnavailable:
        raise
    except Exception as error:  # noqa: BLE001  # any class of the driver; its text may contain the password
        raise DatabaseUnavailable(
            f"The job database does not answer ({type(error).__name__}).",
            expected="a database that can be reached, read and written.",
            advice="Check COUNTERPART_DATABASE, its server and its user, or the disk of COUNTERPART_STORE.",
        ) from None


def _check(database_url: str) -> None:
    url = sa.make_url(database_url)
    if url.get_backend_name() != "sqlite":
        database = connect(database_url)
        try:
            with database.connect() as connection:
                connection.execute(sa.text("SELECT 1"))
        finally:
            database.dispose()
        return
    if not url.database or not Path(url.database).exists():
        return
    try:
        with closing(sqlite3.connect(f"{Path(url.database).absolute().as_uri()}?mode=rw", uri=True)) as file:
            found = file.execute("PRAGMA quick_check(1)").fetchall()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise
        found = []
    if found != [("ok",)]:
        raise DatabaseUnavailable(
            "The SQLite file of the job database is damaged.",
            expected="a file that passes SQLite's quick_check.",
            advice="Stop the service and restore the file from a backup (see docs/operations.md).",
        )


def connect(database_url: str) -> sa.Engine:
    """Return an engine with few connections for a SQLite or PostgreSQL URL."""
    url = sa.make_url(database_url)
    if url.get_backend_name() == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
        timeout = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_SECONDS}
        return sa.create_engine(url, pool_size=2, pool_pre_ping=True, pool_timeout=POOL_SECONDS, connect_args=timeout)
    # Writers wait for each other, as the writers of DBOS do.
    return sa.create_engine(url, connect_args={"timeout": 30})


def enable_write_ahead_log(database: sa.Engine) -> None:
    """Switch SQLite to its write-ahead log, so that readers do not wait for a writer's disk.

    The database file keeps the mode. If another process has the file open, the mode stays unchanged until the
    next start.
    """
    if database.dialect.name == "sqlite":
        with suppress(sa.exc.OperationalError), database.connect() as connection:
            connection.execute(sa.text("PRAGMA journal_mode=WAL"))


def truncate_write_ahead_log(database: sa.Engine) -> None:
    """Empty SQLite's write-ahead log, which otherwise holds erased rows until they are overwritten.

    If another connection is reading, the log stays unchanged. Callers repeat the call periodically.
    """
    if database.dialect.name != "sqlite":
        return
    with suppress(sa.exc.OperationalError), database.connect() as connection:
        (timeout,) = connection.execute(sa.text("PRAGMA busy_timeout")).scalars()
        connection.execute(sa.text(f"PRAGMA busy_timeout={TRUNCATE_TIMEOUT}"))
        connection.execute(sa.text("PRAGMA wal_checkpoint(TRUNCATE)"))
        connection.execute(sa.text(f"PRAGMA busy_timeout={timeout}"))


def create_tables(database: sa.Engine, metadata: sa.MetaData) -> None:
    """Create the tables that are missing. Two processes may do so at once."""
    for table in metadata.sorted_tables:
        try:
            with database.begin() as connection:
                table.create(connection, checkfirst=True)
        except sa.exc.DBAPIError:
            if not sa.inspect(database).has_table(table.name):
                raise


def workflow_table(database: sa.Engine) -> sa.TableClause:
    """Return the columns of DBOS's table of workflows that this service reads or updates."""
    return sa.table(
        "workflow_status",
        sa.column("workflow_uuid", sa.Text),
        sa.column("name", sa.Text),
        sa.column("status", sa.Text),
        sa.column("priority", sa.Integer),
        sa.column("created_at", sa.BigInteger),  # milliseconds since the epoch
        sa.column("updated_at", sa.BigInteger),
        sa.column("executor_id", sa.Text),
        sa.column("owner_xid", sa.Text),  # token of the claim
        sa.column("started_at_epoch_ms", sa.BigInteger),
        sa.column("delay_until_epoch_ms", sa.BigInteger),  # of a DELAYED job
        sa.column("application_version", sa.Text),
        sa.column("attributes", sa.JSON().with_variant(JSONB(), "postgresql")),
        schema=_schema(database),
    )


def step_table(database: sa.Engine) -> sa.TableClause:
    """Return DBOS's table of recorded step outputs."""
    return sa.table("operation_outputs", sa.column("workflow_uuid", sa.Text), schema=_schema(database))


def _schema(database: sa.Engine) -> str | None:
    return "dbos" if database.dialect.name == "postgresql" else None
