"""Database connection beside that of DBOS, for queries that DBOS has no call for."""

from contextlib import suppress

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

# Longest time that truncating the log waits for readers, in milliseconds.
TRUNCATE_TIMEOUT = 100


def connect(database_url: str) -> sa.Engine:
    """Return an engine with few connections for a SQLite or PostgreSQL URL."""
    url = sa.make_url(database_url)
    if url.get_backend_name() == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
        return sa.create_engine(url, pool_size=2, pool_pre_ping=True)
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


def workflow_table(database: sa.Engine) -> sa.TableClause:
    """Return the columns of DBOS's table of workflows that this service reads or updates."""
    return sa.table(
        "workflow_status",
        sa.column("workflow_uuid", sa.Text),
        sa.column("name", sa.Text),
        sa.column("status", sa.Text),
        sa.column("priority", sa.Integer),
        sa.column("created_at", sa.BigInteger),  # milliseconds since the epoch
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
