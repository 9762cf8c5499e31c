"""Durable jobs on DBOS: with `intake`, `listing` and `records`, the only module that knows it.

A job is a workflow of three steps, `infer`, `export` and `publish`, each recorded when it is done. A
process that dies leaves its job pending; whoever notices puts it back into the queue (`app.jobs.keeper`),
and the next worker goes on after the last recorded step. Every claim of a job has a token of its own, so
that a worker which was only slow, not dead, can record nothing any more. Only ids and parameters go
into the database, as JSON.
"""

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, cast

import structlog
from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer, PortableWorkflowError

from app import errors
from app.analysis import AnalysisRequest
from app.jobs.database import connect, let_readers_pass, scrub
from app.jobs.engine import Engine
from app.jobs.intake import QUEUE, Intake
from app.jobs.job import ENDED
from app.jobs.keeper import Keeper
from app.jobs.listing import WAITING, WORKFLOW
from app.jobs.metrics import Metrics
from app.jobs.records import STATES
from app.jobs.retention import Limits, surplus
from app.jobs.roster import Roster
from app.jobs.runner import Outcome, Runner, lost_workers
from app.jobs.store import STALE_SECONDS, Slot, Store
from app.jobs.upgrade import begin_again

log = structlog.get_logger("counterpart.jobs")

# Which steps there are, and what they record, the file of `app.inference_result` among it. DBOS gives a job that was begun
# under another number to nobody: drain before a change of it. Code that keeps the steps keeps the number, so
# that an upgrade resumes them. What was not begun has no number yet, and waits for the new code.
STEPS_VERSION = "2"
POLLING_SECONDS = 0.1
# Between two looks for uploads that never became a job: each reads the list of the whole store.
SWEEP_SECONDS = 6 * 3600.0


class Jobs(Intake):
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
        super().__init__(engine, store, connect(database_url), limits)
        self._database_url = database_url
        self._metrics = metrics
        self._runner = Runner(engine, store, self, metrics)
        self._roster = Roster(self._database)
        self._keeper = Keeper(self._roster, self)
        self._slot: Slot | None = None
        self._name = ""
        self._swept = -SWEEP_SECONDS

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
        let_readers_pass(self._database)
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

        # How often a job may be begun is decided in `_step`, which knows a death from a restart.
        @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
        def analyse_scan(job: str, request: dict[str, Any]) -> dict[str, Any]:
            return self._work(job, AnalysisRequest(**request))

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
        self._database.dispose()
        self._engine.close()
        if self._slot is not None:
            self._slot.free()
            self._slot = None

    # ---- what the API asks for ----

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
        self._release(job)

    def erase(self, job: str) -> None:
        """Remove a job and every trace of it, whatever its state."""
        self.get(job)
        # At once, so that nobody who follows it takes it for cancelled.
        DBOS.delete_workflow(job)
        # A worker that would publish just now finds its folder gone, and cannot bring it back.
        self._store.erase(job)
        self._roster.forget(job)
        scrub(self._database)
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
        self._begin_again(dead=worker)
        jobs = [
            status.workflow_id for status in self._statuses(status="PENDING", executor_id=worker, load_output=False)
        ]
        self._roster.lost(worker, jobs)
        self._roster.demote(jobs)
        # Unlike `resume_workflow`, it leaves alone what another worker has claimed meanwhile.
        DBOS._recover_pending_workflows([worker])
        return jobs

    def retain(self) -> None:
        """Erase what is kept too long or takes too much; begin again what an older version handed back."""
        self._begin_again()
        ended = self._list(status=[name for name, state in STATES.items() if state in ENDED], load_output=False)
        sizes = self._store.sizes() if self._limits.keep_gb else {}
        for job in surplus(ended, sizes, self._limits):
            with suppress(errors.NotFound):  # another process does the same
                self.erase(job)
        scrub(self._database)
        if time.monotonic() - self._swept >= SWEEP_SECONDS:
            self._swept = time.monotonic()
            self._sweep()

    def _begin_again(self, dead: str | None = None) -> None:
        for job in begin_again(self._database, WORKFLOW, STEPS_VERSION, dead):
            log.info("begun again", job=job)

    def _sweep(self) -> None:
        """Remove uploads whose process died before their row was written: nobody was told of them."""
        for job in self._store.unclaimed(time.time() - STALE_SECONDS):
            if not self._list(workflow_ids=[job], load_output=False):
                self._store.erase(job)
                log.info("swept", job=job)

    # ---- Ledger, for the runner ----

    def wanted(self, job: str) -> bool:
        """False once the job was cancelled, erased, or given to another worker."""
        return bool(self._list(workflow_ids=[job], status="PENDING", executor_id=self._name, load_output=False))

    def note(self, job: str, stage: str, progress: float) -> None:
        """Keep how far a job is."""
        DBOS.update_workflow_attributes(job, {"stage": stage, "progress": progress}, merge=True)

    def suspected(self, job: str) -> bool:
        """Whether a worker died with this job before."""
        return self._roster.deaths(job) > 0

    def killed(self, job: str) -> int:
        """Keep that a job ended the process of its analysis; how many it has ended where it is to blame, else 0."""
        self._roster.killed(self._name, job)
        return self._guilt(job)

    # ---- inside ----

    def _work(self, job: str, request: AnalysisRequest) -> dict[str, Any]:
        """The steps of a job: what is recorded of one that was done is returned without doing it again."""
        with self._runner.begin(job, request) as attempt:
            inferred = DBOS.run_step({"name": "infer"}, self._step, job, attempt.infer)
            self._end_if_failed(job, inferred)
            name = str(inferred["inferred"])
            exported = DBOS.run_step({"name": "export"}, self._step, job, lambda: attempt.export(name))
            self._end_if_failed(job, exported)
            DBOS.run_step({"name": "publish"}, self._store.publish, job, str(exported["work"]))
        self._metrics.outcomes.labels("succeeded").inc()
        return {"model": exported["model"], "results": exported["results"]}

    def _step(self, job: str, step: Callable[[], Outcome]) -> Outcome:
        lost = self._guilt(job)
        outcome: Outcome = {"problem": lost_workers(job, lost)} if lost else step()
        problem = cast("dict[str, str] | None", outcome.get("problem"))
        # The list can be asked for them.
        if problem:
            DBOS.update_workflow_attributes(job, {"code": problem["code"]}, merge=True)
        elif "model" in outcome:
            DBOS.update_workflow_attributes(job, {"model": outcome["model"]}, merge=True)
        return outcome

    def _end_if_failed(self, job: str, outcome: Outcome) -> None:
        if "problem" in outcome:
            self._release(job)
            raise _failure(cast("dict[str, str]", outcome["problem"]), self._metrics)

    def _release(self, job: str) -> None:
        """Remove what was inferred of a job that has no use for it; it goes with the job at the latest."""
        with suppress(errors.StoreUnavailable):
            self._store.release(job)

    def _guilt(self, job: str) -> int:
        lost = self._roster.blamed(job)
        if lost:
            self._roster.forget(job)
        return lost


def _failure(problem: dict[str, str], metrics: Metrics) -> PortableWorkflowError:
    metrics.outcomes.labels(problem["code"]).inc()
    return PortableWorkflowError(problem["title"], "CounterpartError", problem["code"], dict(problem))


def _quieten() -> None:
    """Give DBOS's log to the process's own handlers, without the failures that are a job's outcome."""
    logger = logging.getLogger("dbos")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # else DBOS adds one that prints exceptions
        logger.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], PortableWorkflowError)))
