"""Durable jobs on DBOS: with `listing` and `records`, the only module that knows it.

A job is a workflow of two steps, `analyse` and `publish`, each recorded when it is done. A process
that dies leaves its job pending; whoever notices puts it back into the queue (`app.jobs.keeper`), and
the next worker goes on after the last recorded step. Every claim of a job has a token of its own, so
that a worker which was only slow, not dead, can record nothing any more. Only ids and parameters go
into the database, as JSON.
"""

import hashlib
import logging
import secrets
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, cast

import structlog
from dbos import (
    DBOS,
    DBOSClient,
    DBOSConfig,
    DBOSPortableJSONSerializer,
    EnqueueOptions,
    PortableWorkflowError,
)

from app import errors
from app.analyse import Request
from app.jobs.engine import Engine
from app.jobs.job import ENDED, Job, Priority
from app.jobs.keeper import Keeper
from app.jobs.listing import WAITING, WORKFLOW, Listing
from app.jobs.metrics import Metrics
from app.jobs.records import ANSWERING, PRIORITIES, STATES
from app.jobs.retention import Limits, surplus
from app.jobs.roster import Roster
from app.jobs.runner import Runner
from app.jobs.store import Incoming, Slot, Store

log = structlog.get_logger("counterpart.jobs")

QUEUE = "scans"
# Which steps there are, and what they record. A change of it strands the jobs that are under way:
# drain first. Code that keeps the steps keeps the number, so that an upgrade resumes them.
STEPS_VERSION = "1"
POLLING_SECONDS = 0.1


class Jobs(Listing):
    """Everything that may be done with jobs; every method blocks, and none may run on an event loop.

    Parameters
    ----------
    engine : Engine
    store : Store
    database_url : str
        SQLAlchemy's.
    metrics : Metrics
    limits : Limits
    """

    def __init__(self, engine: Engine, store: Store, database_url: str, metrics: Metrics, limits: Limits) -> None:
        self._store = store
        self._database_url = database_url
        self._metrics = metrics
        self._limits = limits
        self._engine = engine
        self._runner = Runner(engine, store, self, metrics)
        self._roster = Roster(database_url)
        self._keeper = Keeper(self._roster, self)
        self._slot: Slot | None = None
        self._name = ""

    # ---- life cycle ----

    def start(self, *, worker: bool = True) -> None:
        """Open the database, look after the workers, and be one.

        Parameters
        ----------
        worker : bool
            Work the queue, one scan at a time; without, only take scans and answer for them.
        """
        self._slot = self._store.take_slot()
        self._store.sweep()
        self._name = f"{self._slot.name}-{secrets.token_hex(4)}"
        _quieten()
        DBOS(
            config=DBOSConfig(
                name="counterpart",
                system_database_url=self._database_url,
                application_version=STEPS_VERSION,
                executor_id=self._name,
                serializer=DBOSPortableJSONSerializer(),
                log_level="WARNING",
            )
        )

        # How often a job may be begun is decided in `_analyse`, which knows a death from a restart.
        @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
        def analyse_scan(job: str, request: dict[str, Any]) -> dict[str, Any]:
            outcome = DBOS.run_step({"name": "analyse"}, self._analyse, job, Request(**request))
            if "problem" in outcome:
                raise _failure(cast("dict[str, str]", outcome["problem"]), self._metrics)
            DBOS.run_step({"name": "publish"}, self._store.publish, job, str(outcome["work"]))
            self._metrics.outcomes.labels("succeeded").inc()
            return {"model": outcome["model"], "results": outcome.get("results")}

        if not worker:
            DBOS.listen_queues([])
        DBOS.launch()
        self._roster.create()
        # Whoever had this slot before is dead for certain: the system gave its lock to us.
        self._keeper.start(self._name if worker else None, dead=f"{self._slot.name}-")
        DBOS.register_queue(
            QUEUE, worker_concurrency=1, polling_interval_sec=POLLING_SECONDS, on_conflict="always_update"
        )

    def stop(self, drain_seconds: float) -> None:
        """Let the running job end for a while, then hand it to another worker or to the next start."""
        self._runner.stop(drain_seconds)
        self._keeper.stop()
        DBOS.destroy()
        # After the queue's own thread has ended, or it would take the job again.
        client = DBOSClient(system_database_url=self._database_url, serializer=DBOSPortableJSONSerializer())
        try:
            for status in client.list_workflows(name=WORKFLOW, status="PENDING", executor_id=self._name):
                client.resume_workflow(status.workflow_id, queue_name=QUEUE)
        finally:
            client.destroy()
        self._roster.leave(self._name)
        self._roster.close()
        if self._slot is not None:
            self._slot.free()
            self._slot = None

    # ---- what the API asks for ----

    def check_room(self, size: int) -> None:
        """Refuse a scan that would wait too long, or fill the disk.

        Parameters
        ----------
        size : int
            Bytes of the upload, as far as they are known.

        Raises
        ------
        StoreFull
            Too little disk would be left.
        QueueFull
            As many as the limit are waiting.
        """
        self._limits.check_disk(self._store, size)
        waiting = len(self.places())
        if waiting >= self._limits.queue:
            raise errors.QueueFull(
                f"{waiting} scans are waiting.",
                expected=f"fewer than {self._limits.queue}.",
                advice="Send it again later (see Retry-After), or raise COUNTERPART_QUEUE_LIMIT.",
            )

    def submit(self, incoming: Incoming, request: Request, key: str | None, priority: Priority = "routine") -> str:
        """Make a job of an upload, or find the one that there is.

        Parameters
        ----------
        incoming : Incoming
            Whole; moved into the store where the job is new.
        request : Request
            Model and parameters.
        key : str or None
            The caller's Idempotency-Key: it names the job instead of the content.
        priority : {"routine", "stat"}
            Of a new job; one that there is keeps its own.

        Returns
        -------
        str
            The job's id. The upload and the job are on the disk.

        Raises
        ------
        IdempotencyKeyReused
            The key belongs to a job of another content.
        """
        content = self._content(incoming.digest, request)
        # The key itself may name a patient: only its hash is kept.
        identity = content if key is None else _sha256("key", key)
        job = self._answering(identity, content)
        if job is not None:
            return job
        job = f"{identity[:16]}-{secrets.token_hex(8)}"
        self._store.keep(incoming, job)
        options = EnqueueOptions(
            workflow_name=WORKFLOW,
            queue_name=QUEUE,
            workflow_id=job,
            deduplication_id=identity,
            duplication_policy="return-existing",
            priority=PRIORITIES[priority],
            attributes={"content": content, "model": request.model, "stage": None, "progress": 0.0},
        )
        parameters = asdict(request)
        winner = DBOS.enqueue_workflow_with_options(options, job, parameters).workflow_id
        if winner != job:  # the same scan was sent twice at the same moment
            self._store.erase(job)
            self._check_content(self.get(winner), content)
        return winner

    def workers(self) -> int:
        """How many workers live, here and elsewhere."""
        return len(self._roster.beats())

    def cancel(self, job: str) -> None:
        """Stop a job. Again is no error.

        Raises
        ------
        AlreadyFinished
            It succeeded or failed before.
        """
        before = self.get(job).state
        if before != "failed":
            DBOS.cancel_workflow(job)
        state = self.get(job).state
        if state != "cancelled":
            raise errors.AlreadyFinished(
                f"The job has {state}.",
                expected="a job that is queued or running.",
                advice="Use DELETE to erase it with its results.",
            )
        if before != "cancelled":
            self._metrics.outcomes.labels("cancelled").inc()
            log.info("cancelled", job=job)

    def erase(self, job: str) -> None:
        """Remove a job and every trace of it, whatever its state."""
        self.get(job)
        # At once, so that nobody who follows it takes it for cancelled.
        DBOS.delete_workflow(job)
        # A worker that would publish just now finds its folder gone, and cannot bring it back.
        self._store.erase(job)
        self._roster.forget(job)
        log.info("erased", job=job)

    def metrics(self) -> bytes:
        """Prometheus text, with the depth of the queue as it is now."""
        waiting = self._list(status=WAITING, load_output=False)
        self._metrics.queued.set(len(waiting))
        ages = [(datetime.now(UTC) - job.created).total_seconds() for job in waiting]
        self._metrics.oldest.set(max([0.0, *ages]))
        self._metrics.workers.set(self.workers())
        self._metrics.running.set(len(self._list(status="PENDING", load_output=False)))
        return self._metrics.text()

    # ---- Custody, for the keeper ----

    def holders(self) -> set[str]:
        """Names of the workers that hold a job."""
        pending = self._statuses(status="PENDING", load_output=False)
        return {status.executor_id for status in pending if status.executor_id}

    def take_back(self, worker: str) -> list[str]:
        """Put the jobs of a dead worker back into the queue; two who do it at once do it once."""
        jobs = [
            status.workflow_id for status in self._statuses(status="PENDING", executor_id=worker, load_output=False)
        ]
        self._roster.lost(worker, jobs)
        self._roster.demote(jobs)
        # Unlike `resume_workflow`, it leaves alone what another worker has claimed meanwhile.
        DBOS._recover_pending_workflows([worker])
        return jobs

    def retain(self) -> None:
        """Erase what is kept too long or takes too much."""
        ended = self._list(status=[name for name, state in STATES.items() if state in ENDED], load_output=False)
        sizes = self._store.sizes() if self._limits.keep_gb else {}
        for job in surplus(ended, sizes, self._limits):
            with suppress(errors.NotFound):  # another process does the same
                self.erase(job)

    # ---- Ledger, for the runner ----

    def wanted(self, job: str) -> bool:
        """False once the job was cancelled, erased, or given to another worker."""
        return bool(self._list(workflow_ids=[job], status="PENDING", executor_id=self._name, load_output=False))

    def note(self, job: str, stage: str, progress: float) -> None:
        """Keep how far a job is."""
        DBOS.update_workflow_attributes(job, {"stage": stage, "progress": progress}, merge=True)

    # ---- inside ----

    def _analyse(self, job: str, request: Request) -> dict[str, object]:
        lost = self._roster.blamed(job)
        if not lost:
            return self._runner.analyse(job, request)
        self._roster.forget(job)
        log.error("failed", job=job, code=errors.WorkerLost.code)
        problem = errors.WorkerLost(
            f"{lost} workers died while they analysed this scan.",
            expected="an analysis that ends in a result or a reason.",
            advice="The machine may be short of memory. Report the job's id; other scans are not affected.",
        ).problem
        return {"problem": problem}

    def _content(self, digest: str, request: Request) -> str:
        """Hash of all that decides the answer: bytes, parameters, and the models it may be made with."""
        models = sorted(m.id for m in self._engine.manifests if request.model in (None, m.name, m.id))
        # Who names a model vouches for a scan that says nothing: the report tells the two apart.
        named = "named" if request.model else "chosen"
        return _sha256("content", digest, *models, named, repr(request.series), repr(request.seed), request.geometry)

    def _answering(self, identity: str, content: str) -> str | None:
        found = self._list(
            workflow_id_prefix=identity[:16] + "-", status=ANSWERING, sort_desc=True, limit=1, load_output=False
        )
        if not found:
            return None
        self._check_content(found[0], content)
        return found[0].id

    def _check_content(self, job: Job, content: str) -> None:
        if job.content != content:
            raise errors.IdempotencyKeyReused(
                "The Idempotency-Key was used for another scan, model or parameters.",
                expected="one key for one scan with its parameters.",
                advice="Send a new key, or none: the same content gives the same job anyway.",
            )


def _failure(problem: dict[str, str], metrics: Metrics) -> PortableWorkflowError:
    metrics.outcomes.labels(problem["code"]).inc()
    return PortableWorkflowError(problem["title"], "CounterpartError", problem["code"], dict(problem))


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _quieten() -> None:
    """Give DBOS's log to the process's own handlers, without the failures that are a job's outcome."""
    logger = logging.getLogger("dbos")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # else DBOS adds one that prints exceptions
        logger.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], PortableWorkflowError)))
