"""Which workers live, and which scans lost theirs: two small tables beside DBOS's own, in the same database.

A worker counts its beats up in its row. Nobody compares clocks: who looks on notes when it last saw
the count change, by its own clock, and takes a worker whose count stands still for dead.
"""

import secrets
import time
from collections.abc import Iterable

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from app.jobs.database import workflow_status

# Seconds between two beats, and without one until a worker is taken for dead: a busy machine may miss some.
BEAT_SECONDS = 2.0
LEASE_SECONDS = 15.0
# A scan is parked when it has ended this many workers. That it was the scan is certain where its analysis died and
# the worker lived to see it (`app.jobs.apart`). Where the worker died too, nobody knows why: the scan is tried again
# under a guard that keeps its memory from taking the worker with it (`app.jobs.child`), and what happens
# then is certain. A worker that dies in spite of the guard died of something else; the end of such a row is
# for what nobody thought of.
DEATHS = 2
DEATHS_AT_MOST = 20
# In the name under which a certain death is kept.
CERTAIN = "/"
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
    database : sqlalchemy.Engine
    """

    def __init__(self, database: sa.Engine) -> None:
        self._engine = database
        self._status = workflow_status(database)

    def create(self) -> None:
        """Make the tables where they are missing; two processes may do so at once."""
        for table in metadata.sorted_tables:
            try:
                with self._engine.begin() as connection:
                    table.create(connection, checkfirst=True)
            except sa.exc.DBAPIError:
                if not sa.inspect(self._engine).has_table(table.name):
                    raise

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

    def killed(self, worker: str, job: str) -> None:
        """Note that a job ended the process of its analysis, as its worker saw."""
        self.lost(f"{worker}{CERTAIN}{secrets.token_hex(4)}", [job])

    def deaths(self, job: str) -> int:
        """How many workers died with a job."""
        return self._count(deaths.c.job == job)

    def blamed(self, job: str) -> int:
        """How many workers a job has ended, where it is to blame; else 0."""
        every = self.deaths(job)
        seen = self._count(deaths.c.job == job, deaths.c.worker.contains(CERTAIN))
        return every if every >= (DEATHS if seen else DEATHS_AT_MOST) else 0

    def forget(self, job: str) -> None:
        """Drop what is known of a job: it was erased, or it is settled."""
        with self._engine.begin() as connection:
            connection.execute(deaths.delete().where(deaths.c.job == job))

    def _count(self, *which: sa.ColumnElement[bool]) -> int:
        with self._engine.connect() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(deaths).where(*which)).scalar_one()


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
