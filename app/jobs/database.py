"""The database beside DBOS's own use of it: for what DBOS has no call for, its table of workflows is read."""

from contextlib import suppress

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

# Longest that erasing waits for those who read.
SCRUB_MILLISECONDS = 100


def connect(database_url: str) -> sa.Engine:
    """An engine, SQLite or PostgreSQL, that few connections are enough for."""
    url = sa.make_url(database_url)
    if url.get_backend_name() == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
        return sa.create_engine(url, pool_size=2, pool_pre_ping=True)
    # Writers wait for each other, as DBOS's do.
    return sa.create_engine(url, connect_args={"timeout": 30})


def let_readers_pass(database: sa.Engine) -> None:
    """SQLite's write-ahead log: who reads does not wait for a writer's disk. The file keeps it once it is set.

    Where another process has the file open just now, it stays as it is until the next start.
    """
    if database.dialect.name == "sqlite":
        with suppress(sa.exc.OperationalError), database.connect() as connection:
            connection.execute(sa.text("PRAGMA journal_mode=WAL"))


def scrub(database: sa.Engine) -> None:
    """Empty SQLite's write-ahead log, which holds rows that were erased until it is written over.

    Where somebody reads just now it stays as it is: whoever calls this calls it again.
    """
    if database.dialect.name != "sqlite":
        return
    with suppress(sa.exc.OperationalError), database.connect() as connection:
        (patience,) = connection.execute(sa.text("PRAGMA busy_timeout")).scalars()
        connection.execute(sa.text(f"PRAGMA busy_timeout={SCRUB_MILLISECONDS}"))
        connection.execute(sa.text("PRAGMA wal_checkpoint(TRUNCATE)"))
        connection.execute(sa.text(f"PRAGMA busy_timeout={patience}"))


def workflow_status(database: sa.Engine) -> sa.TableClause:
    """DBOS's table of workflows, as much of it as is read here."""
    return sa.table(
        "workflow_status",
        sa.column("workflow_uuid", sa.Text),
        sa.column("name", sa.Text),
        sa.column("status", sa.Text),
        sa.column("priority", sa.Integer),
        sa.column("created_at", sa.BigInteger),  # milliseconds
        sa.column("executor_id", sa.Text),
        sa.column("application_version", sa.Text),
        sa.column("attributes", sa.JSON().with_variant(JSONB(), "postgresql")),
        schema=_schema(database),
    )


def recorded_steps(database: sa.Engine) -> sa.TableClause:
    """DBOS's table of what steps returned."""
    return sa.table("operation_outputs", sa.column("workflow_uuid", sa.Text), schema=_schema(database))


def _schema(database: sa.Engine) -> str | None:
    return "dbos" if database.dialect.name == "postgresql" else None
