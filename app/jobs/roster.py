"""Which workers live, and which scans lost theirs: two small tables beside DBOS's own, in the same database.

A worker counts its beats up in its row. Nobody compares clocks: who looks on notes when it last saw
the count change, by its own clock, and takes a worker whose count stands still for dead.
"""

import time
from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

# Seconds between two beats, and without one until a worker is taken for dead: a busy machine may miss some.
BEAT_SECONDS = 2.0
LEASE_SECONDS = 15.0
# A scan is blamed for the death of this many workers; for this many whatever happened to others.
DEATHS = 2
DEATHS_AT_MOST = 4
# Seconds. Where other scans lost their workers too in this time, it is the machine that fails, not the scan.
EXCUSE_SECONDS = 900.0
# Seconds that a death is remembered.
MEMORY_SECONDS = 7 * 24 * 3600.0

metadata = sa.MetaData()
workers = sa.Table(
    "counterpart_workers",
    metadata,
    sa.Column("worker", sa.Text, primary_key=True),
    sa.Column("beats", sa.BigInteger, nullable=False),
)
deaths = sa.Table(
    "counterpart_deaths",
    metadata,
    sa.Column("job", sa.Text, primary_key=True),
    sa.Column("worker", sa.Text, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
)


class Roster:
    """The two tables.

    Parameters
    ----------
    database_url : str
        SQLAlchemy's; SQLite or PostgreSQL.
    """

    def __init__(self, database_url: str) -> None:
        url = sa.make_url(database_url)
        if url.get_backend_name() == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
            self._engine = sa.create_engine(url, pool_size=2, pool_pre_ping=True)
        else:
            # Writers wait for each other, as DBOS's do.
            self._engine = sa.create_engine(url, connect_args={"timeout": 30})
        schema = "dbos" if self._engine.dialect.name == "postgresql" else None
        columns = (sa.column("workflow_uuid", sa.Text), sa.column("priority", sa.Integer))
        self._status = sa.table("workflow_status", *columns, schema=schema)  # DBOS's own

    def create(self) -> None:
        """Make the tables where they are missing; two processes may do so at once."""
        for table in metadata.sorted_tables:
            try:
                with self._engine.begin() as connection:
                    table.create(connection, checkfirst=True)
            except sa.exc.DBAPIError:
                if not sa.inspect(self._engine).has_table(table.name):
                    raise

    def close(self) -> None:
        """Let go of the connections."""
        self._engine.dispose()

    def beat(self, worker: str) -> None:
        """Tell that a worker lives; the first beat enters it."""
        with self._engine.begin() as connection:
            same = workers.c.worker == worker
            if not connection.execute(workers.update().where(same).values(beats=workers.c.beats + 1)).rowcount:
                connection.execute(workers.insert().values(worker=worker, beats=0))

    def leave(self, worker: str) -> None:
        """Strike a worker off."""
        with self._engine.begin() as connection:
            connection.execute(workers.delete().where(workers.c.worker == worker))

    def beats(self) -> dict[str, int]:
        """The count of every worker that is entered."""
        with self._engine.connect() as connection:
            return {row.worker: row.beats for row in connection.execute(sa.select(workers))}

    def lost(self, worker: str, jobs: Iterable[str]) -> None:
        """Note that a worker died with these jobs; two who notice the same death note it once."""
        now = time.time()
        for job in jobs:
            try:
                with self._engine.begin() as connection:
                    connection.execute(deaths.insert().values(job=job, worker=worker, at=now))
            except IntegrityError:
                continue
        with self._engine.begin() as connection:
            connection.execute(deaths.delete().where(deaths.c.at < now - MEMORY_SECONDS))

    def demote(self, jobs: Iterable[str]) -> None:
        """Let jobs that lost a worker stand behind all others of their class: they may do it again.

        DBOS has no call for it once a job was enqueued.
        """
        priority = self._status.c.priority
        with self._engine.begin() as connection:
            for job in jobs:
                suspect = self._status.update().where(self._status.c.workflow_uuid == job)
                connection.execute(suspect.values(priority=sa.case((priority % 2 == 0, priority + 1), else_=priority)))

    def blamed(self, job: str) -> int:
        """How many workers a job has killed, where it is to blame; else 0."""
        with self._engine.connect() as connection:
            mine = connection.execute(sa.select(sa.func.count()).where(deaths.c.job == job)).scalar_one()
            recent = deaths.c.at > time.time() - EXCUSE_SECONDS
            others = connection.execute(sa.select(sa.func.count()).where(deaths.c.job != job, recent)).scalar_one()
        return mine if mine >= (DEATHS_AT_MOST if others else DEATHS) else 0

    def forget(self, job: str) -> None:
        """Drop what is known of a job: it was erased, or its guilt is settled and excuses no other."""
        with self._engine.begin() as connection:
            connection.execute(deaths.delete().where(deaths.c.job == job))


class Watch:
    """Who looks on: when each worker's count last changed, by the clock of this process."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, float]] = {}

    def dead(self, beats: dict[str, int], now: float) -> list[str]:
        """Workers whose count has stood still for too long.

        Parameters
        ----------
        beats : dict
            Count of each worker; one without a row that yet holds a job has -1.
        now : float
            Monotonic seconds.
        """
        changed = {name: (count, now) for name, count in beats.items()}
        self._seen = {
            name: self._seen[name] if self._seen.get(name, (None, 0.0))[0] == count else changed[name]
            for name, count in beats.items()
        }
        return [name for name, (_, since) in self._seen.items() if now - since > LEASE_SECONDS]
