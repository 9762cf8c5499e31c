"""Maintenance of the jobs: recovery from dead workers, jobs of other versions, and limits on disk use.

Two tables beside those of DBOS hold the heartbeats and the crash records. A worker increments the counter of its
row. No clocks are compared: each observer notes by its own clock when a counter last changed, and considers a
worker dead if its counter has not changed for the length of a lease.
"""

import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError

from app.errors import StoreFull, error_location
from app.jobs.database import create_tables, step_table, workflow_table
from app.jobs.job import Job
from app.jobs.store import Store

# Seconds between two heartbeats, and without one until a worker is considered dead. A busy machine may miss some.
HEARTBEAT_SECONDS = 2.0
LEASE_SECONDS = 15.0
# Seconds between two runs of the retention. The first comes at once.
RETENTION_SECONDS = 600.0
# Seconds between two searches for unfinished erasures.
ERASURE_SECONDS = 30.0
# A scan is quarantined after this many crashes if one of them is confirmed: the child process of the analysis ended and
# its worker recorded it. If the worker itself died, the cause is unknown, and the scan is tried again. The memory of
# the child process is limited (`app.jobs.subprocess_engine`), so that the child dies before its worker. The second
# number limits the unconfirmed crashes.
MAX_CRASHES = 2
MAX_UNCONFIRMED_CRASHES = 20
# A worker name with this mark in a crash record stands for a confirmed crash.
CONFIRMED_MARK = "/"
# A job fails after this many faults of the service. The delay before the next attempt doubles: all take 15 minutes.
MAX_FAULTS = 10
FAULT_DELAY_SECONDS = 2.0
MAX_FAULT_DELAY_SECONDS = 300.0
CRASH_RECORD_SECONDS = 7 * 24 * 3600.0
GIGABYTE = 10**9

log = structlog.get_logger("counterpart.jobs")

metadata = sa.MetaData()
workers_table = sa.Table(
    "counterpart_workers",
    metadata,
    sa.Column("worker", sa.Text, primary_key=True),
    sa.Column("beats", sa.BigInteger, nullable=False),
)
crashes_table = sa.Table(
    "counterpart_deaths",  # the name is older than the term crash
    metadata,
    sa.Column("job", sa.Text, primary_key=True),
    sa.Column("worker", sa.Text, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
)


# ---- workers -----------------------------------------------------------------------------------


class WorkerRegistry:
    """Heartbeats of the workers and crash records of the jobs, in the database.

    Parameters
    ----------
    database : sqlalchemy.Engine
    """

    def __init__(self, database: sa.Engine) -> None:
        self._database = database
        self._workflows = workflow_table(database)

    def create_tables(self) -> None:
        """Create the tables if they are missing. Two processes may do so at once."""
        create_tables(self._database, metadata)

    def send_heartbeat(self, worker: str) -> None:
        """Increment the counter of a worker. The first heartbeat creates its row."""
        t = workers_table.c
        with self._database.begin() as connection:
            update = workers_table.update().where(t.worker == worker).values(beats=t.beats + 1)
            if not connection.execute(update).rowcount:
                connection.execute(workers_table.insert().values(worker=worker, beats=0))

    def remove_worker(self, worker: str) -> None:
        """Remove the row of a worker."""
        with self._database.begin() as connection:
            connection.execute(workers_table.delete().where(workers_table.c.worker == worker))

    def heartbeats(self) -> dict[str, int]:
        """Return the heartbeat counter of each registered worker."""
        with self._database.connect() as connection:
            return {row.worker: row.beats for row in connection.execute(sa.select(workers_table))}

    def record_crash(self, worker: str, jobs: Iterable[str]) -> None:
        """Record an unconfirmed crash of these jobs: their worker died. Recording it again changes nothing."""
        self._insert_crash(worker, jobs)

    def record_child_crash(self, worker: str, job: str) -> None:
        """Record a confirmed crash: the child process died while it ran this job, and its worker lives."""
        self._insert_crash(f"{worker}{CONFIRMED_MARK}{secrets.token_hex(4)}", [job])

    def _insert_crash(self, worker: str, jobs: Iterable[str]) -> None:
        now = time.time()
        for job in jobs:
            try:
                with self._database.begin() as connection:
                    connection.execute(crashes_table.insert().values(job=job, worker=worker, at=now))
            except IntegrityError:
                continue
        with self._database.begin() as connection:
            connection.execute(crashes_table.delete().where(crashes_table.c.at < now - CRASH_RECORD_SECONDS))

    def count_crashes(self, job: str) -> int:
        """Return the number of recorded crashes of a job."""
        return self._count(crashes_table.c.job == job)

    def is_quarantined(self, job: str) -> bool:
        """Return whether a job has so many recorded crashes that it is not tried again."""
        confirmed = self._count(crashes_table.c.job == job, crashes_table.c.worker.contains(CONFIRMED_MARK))
        return self.count_crashes(job) >= (MAX_CRASHES if confirmed else MAX_UNCONFIRMED_CRASHES)

    def delete_crash_records(self, job: str) -> None:
        """Delete the crash records of a job."""
        with self._database.begin() as connection:
            connection.execute(crashes_table.delete().where(crashes_table.c.job == job))

    def lower_priority(self, jobs: Iterable[str]) -> None:
        """Put jobs whose worker died behind all others of their priority class, because they may crash again.

        DBOS has no call that changes the priority of an enqueued workflow.
        """
        t = self._workflows.c
        with self._database.begin() as connection:
            for job in jobs:
                update = self._workflows.update().where(t.workflow_uuid == job)
                lowered = sa.case((t.priority % 2 == 0, t.priority + 1), else_=t.priority)
                connection.execute(update.values(priority=lowered))

    def _count(self, *conditions: sa.ColumnElement[bool]) -> int:
        with self._database.connect() as connection:
            query = sa.select(sa.func.count()).select_from(crashes_table).where(*conditions)
            return connection.execute(query).scalar_one()


class HeartbeatMonitor:
    """Times of the last change of each worker's heartbeat counter, by the clock of this process."""

    def __init__(self) -> None:
        self._last_change: dict[str, tuple[int, float]] = {}

    def find_dead(self, heartbeats: dict[str, int], now: float) -> list[str]:
        """Return the workers whose counter has not changed for longer than a lease.

        Parameters
        ----------
        heartbeats : dict
            Counter of each worker. A worker that holds a job but has no row has -1.
        now : float
            Monotonic time in seconds.
        """
        previous = self._last_change
        self._last_change = {
            worker: previous[worker] if previous.get(worker, (None, 0.0))[0] == count else (count, now)
            for worker, count in heartbeats.items()
        }
        return [worker for worker, (_, since) in self._last_change.items() if now - since > LEASE_SECONDS]


class JobRecovery(Protocol):
    """Operations on jobs that the supervisor needs."""

    def find_busy_workers(self) -> set[str]:
        """Return the names of the workers that hold a job."""

    def requeue_jobs(self, worker: str) -> list[str]:
        """Put the jobs of a dead worker back into the queue, and return their ids."""

    def requeue_stuck_jobs(self) -> None:
        """Put jobs that the database gives to this process, but that it does not run, back into the queue."""

    def finish_erasures(self) -> None:
        """Finish erasures that a fault or the death of a process interrupted."""

    def enforce_retention(self) -> None:
        """Erase expired jobs."""


class Supervisor:
    """A thread that sends this worker's heartbeats, recovers the jobs of dead workers and enforces the retention.

    Parameters
    ----------
    registry : WorkerRegistry
    recovery : JobRecovery
    """

    def __init__(self, registry: WorkerRegistry, recovery: JobRecovery) -> None:
        self._registry = registry
        self._recovery = recovery
        self._monitor = HeartbeatMonitor()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, worker: str | None, slot_prefix: str) -> None:
        """Recover the jobs of earlier processes of this slot at once, then start the thread.

        Parameters
        ----------
        worker : str or None
            Name of this worker. None sends no heartbeats.
        slot_prefix : str
            Prefix of the names of all workers that have held this slot.
        """
        if worker:
            self._registry.send_heartbeat(worker)
        for name in self._registry.heartbeats().keys() | self._recovery.find_busy_workers():
            if name.startswith(slot_prefix) and name != worker:
                self._recover(name)
        self._thread = threading.Thread(target=self._run, args=(worker,), name="supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, worker: str | None) -> None:
        last_retention, last_erasures = -RETENTION_SECONDS, -ERASURE_SECONDS
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            try:
                if worker:
                    self._registry.send_heartbeat(worker)
                self._check_heartbeats()
                self._recovery.requeue_stuck_jobs()
                if time.monotonic() - last_erasures > ERASURE_SECONDS:
                    last_erasures = time.monotonic()
                    self._recovery.finish_erasures()
                if time.monotonic() - last_retention > RETENTION_SECONDS:
                    last_retention = time.monotonic()
                    self._recovery.enforce_retention()
            except Exception as error:  # noqa: BLE001  # the database may answer again at the next heartbeat
                log.warning("supervisor failed", **error_location(error))

    def _check_heartbeats(self) -> None:
        heartbeats = {**dict.fromkeys(self._recovery.find_busy_workers(), -1), **self._registry.heartbeats()}
        for worker in self._monitor.find_dead(heartbeats, time.monotonic()):
            self._recover(worker)

    def _recover(self, worker: str) -> None:
        jobs = self._recovery.requeue_jobs(worker)
        self._registry.remove_worker(worker)
        for job in jobs:
            log.warning("job of a dead worker requeued", job=job)


# ---- jobs that start again ---------------------------------------------------------------------


def return_job(database: sa.Engine, job: str, worker: str, code: str | None) -> int:
    """Put a job that a worker holds back into the queue, after a fault of the service.

    DBOS writes a token into the job's row at each claim (`owner_xid`). A claim can record only while the row has its
    token. The token is removed, so that what still runs of this claim can record nothing more. DBOS makes the job
    available after a delay. It has no call that does this for one job of a live worker.

    Parameters
    ----------
    database : sqlalchemy.Engine
    job, worker : str
    code : str or None
        Code of the fault that the job met. None if the job was not tried.

    Returns
    -------
    int
        Faults that the job has met. At `MAX_FAULTS`, the job stays with the worker, which must fail it. 0 if the
        worker does not hold the job.
    """
    t = workflow_table(database)
    held = (t.c.workflow_uuid == job, t.c.status == "PENDING", t.c.executor_id == worker)
    with database.begin() as connection:
        row = connection.execute(sa.select(t.c.attributes).where(*held).with_for_update()).one_or_none()
        if row is None:
            return 0
        attributes = dict(row.attributes or {})
        faults = int(attributes.get("faults", 0)) + (code is not None)
        attributes["faults"] = faults
        values: dict[str, object] = {"attributes": attributes}
        if faults >= MAX_FAULTS:
            attributes["code"] = code  # for `JobFilter`
        else:
            delay = min(FAULT_DELAY_SECONDS * 2 ** max(faults - 1, 0), MAX_FAULT_DELAY_SECONDS)
            values |= {"status": "DELAYED", "delay_until_epoch_ms": round((time.time() + delay) * 1000)}
            values |= {"owner_xid": None, "started_at_epoch_ms": None}
        connection.execute(t.update().where(*held).values(**values))
    return faults


def restart_outdated_jobs(
    database: sa.Engine, workflow: str, version: str, dead_worker: str | None = None
) -> list[str]:
    """Assign unfinished jobs of other versions of the steps to this version, and delete their recorded steps.

    The jobs then start again from the first step. DBOS gives them to workers of this version only.

    Parameters
    ----------
    database : sqlalchemy.Engine
    workflow : str
        Name of the workflow.
    version : str
        Version of the steps of this code.
    dead_worker : str or None
        Take the jobs that this dead worker held, too. By default, only jobs in the queue are taken. A live worker
        of another version keeps its jobs.

    Returns
    -------
    list of str
        Ids of the jobs. If two processes call this at once, each job is returned to one of them.
    """
    workflows, steps = workflow_table(database), step_table(database)
    available = workflows.c.status == "ENQUEUED"
    if dead_worker is not None:
        held = sa.and_(workflows.c.status == "PENDING", workflows.c.executor_id == dead_worker)
        available = sa.or_(available, held)
    # The version of a job that no worker has started is NULL. NULL != version is not true, so that it is not outdated.
    outdated = workflows.c.application_version != version
    update = workflows.update().where(workflows.c.name == workflow, available, outdated)
    with database.begin() as connection:
        # The update locks the rows, so that no worker of the other version can claim them in the meantime.
        restarted = update.values(application_version=version).returning(workflows.c.workflow_uuid)
        jobs = list(connection.execute(restarted).scalars())
        if jobs:
            connection.execute(steps.delete().where(steps.c.workflow_uuid.in_(jobs)))
    return jobs


# ---- limits on disk use ------------------------------------------------------------------------


@dataclass(frozen=True)
class StorageLimits:
    """Limits set by the operator.

    Attributes
    ----------
    queue_limit : int
        Number of waiting jobs at which new jobs are refused.
    min_free_gb : float
        Free disk space in GB (10^9 bytes) below which new scans are refused.
    keep_days : float
        Age in days at which an ended job is erased. 0 keeps all jobs.
    keep_gb : float
        Size of scans and results in GB above which the oldest ended jobs are erased. 0 sets no limit.
    """

    queue_limit: int = 100
    min_free_gb: float = 0.0
    keep_days: float = 0.0
    keep_gb: float = 0.0

    def check_disk(self, store: Store, size: int) -> None:
        """Refuse an upload that would leave too little free disk space.

        Parameters
        ----------
        store : Store
        size : int
            Size of the upload in bytes, as far as it is known.

        Raises
        ------
        StoreFull
        """
        free = shutil.disk_usage(store.root).free - size
        if free < self.min_free_gb * GIGABYTE:
            raise StoreFull(
                f"The scan would leave {max(free, 0) / GIGABYTE:.1f} GB of free disk space.",
                expected=f"at least {self.min_free_gb:g} GB (COUNTERPART_MIN_FREE_GB).",
                advice="Send the scan again later. The operator can free disk space, or keep scans for a shorter time.",
            )


def select_expired(
    ended: Sequence[Job], sizes: dict[str, int], limits: StorageLimits, now: datetime | None = None
) -> list[str]:
    """Return the ids of the jobs to erase, the oldest first.

    Parameters
    ----------
    ended : sequence of Job
        Ended jobs, the oldest first.
    sizes : dict
        Size in bytes of each job in the store.
    limits : StorageLimits
    now : datetime, optional
        UTC time, by default the current time.
    """
    now = now or datetime.now(UTC)
    oldest_kept = now - timedelta(days=limits.keep_days)
    expired = [job.id for job in ended if limits.keep_days and (job.ended or job.created) < oldest_kept]
    if limits.keep_gb:
        total = sum(sizes.values()) - sum(sizes.get(job, 0) for job in expired)
        for job in ended:
            if total <= limits.keep_gb * GIGABYTE:
                break
            if job.id in sizes and job.id not in expired:
                expired.append(job.id)
                total -= sizes[job.id]
    return expired
