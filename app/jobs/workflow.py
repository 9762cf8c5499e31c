"""Durable execution of jobs on DBOS.

A job is a workflow of three steps, `infer`, `export` and `publish`. DBOS records the output of each step. If a
process dies, its job stays pending until another process puts it back into the queue (`app.jobs.maintenance`). The
next worker continues after the last recorded step. DBOS writes a new token into the job's row at each claim, so that a
slow worker that lost its lease can no longer record anything. The database holds ids and parameters only, as JSON. See
decision 14.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, cast

import structlog
from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer, PortableWorkflowError
from dbos._dbos import _get_dbos_instance
from dbos._error import DBOSBaseException

from app import errors
from app.analysis import AnalysisRequest
from app.errors import error_location
from app.jobs.database import connect, enable_write_ahead_log, truncate_write_ahead_log
from app.jobs.deliveries import Router
from app.jobs.engine import Engine
from app.jobs.faults import ServiceFault
from app.jobs.job import ENDED_STATES
from app.jobs.maintenance import (
    MAX_FAULTS,
    StorageLimits,
    Supervisor,
    WorkerRegistry,
    restart_outdated_jobs,
    return_job,
    select_expired,
)
from app.jobs.metrics import Metrics
from app.jobs.queue import QUEUE, STATES, WORKFLOW, JobQueue, list_workflows, to_job
from app.jobs.store import STALE_SECONDS, Slot, Store
from app.jobs.traces import Span, Traces
from app.jobs.worker import Interrupted, StepOutput, Worker, quarantine_problem, to_fault

log = structlog.get_logger("counterpart.jobs")

# Version of the steps and their recorded outputs, the file of `app.jobs.engine` included. DBOS gives a started
# job only to workers of the same version. Increase it only if a step or its recorded output changes, because an upgrade
# to another version restarts started jobs. A job that no worker has started has no version yet.
STEPS_VERSION = "3"
POLLING_SECONDS = 0.1
# Seconds until a job that no worker runs returns to the queue.
STUCK_SECONDS = 10.0
# Seconds between two searches for orphaned uploads, each of which lists the whole store.
SWEEP_SECONDS = 6 * 3600.0


@dataclass(frozen=True)
class JobHooks:
    """Optional parts that act on the jobs of a service.

    Attributes
    ----------
    router : callable or None
        Returns the deliveries of a succeeded job. None if there are no routes.
    traces : Traces or None
        Receives the spans of the steps.
    """

    router: Router | None = None
    traces: Traces | None = None


NO_HOOKS = JobHooks()


class JobService:
    """The queue with its worker and supervisor, from start to stop.

    It implements `JobControl` for the worker and `JobRecovery` for the supervisor. Every method blocks. Call none of
    them on an event loop.

    Parameters
    ----------
    engine : Engine
    store : Store
    database_url : str
        SQLAlchemy URL.
    metrics : Metrics
    limits : StorageLimits
    hooks : JobHooks

    Attributes
    ----------
    queue : JobQueue
    health : WorkerHealth
        Why the worker of this process pauses.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        database_url: str,
        metrics: Metrics,
        limits: StorageLimits,
        hooks: JobHooks = NO_HOOKS,
    ) -> None:
        self._engine = engine
        self._store = store
        self._database_url = database_url
        self._metrics = metrics
        self._limits = limits
        self._router = hooks.router
        self._traces = hooks.traces
        self._database = connect(database_url)
        self._registry = WorkerRegistry(self._database)
        self.queue = JobQueue(engine, store, self._database, self._registry, metrics, limits)
        self._worker = Worker(engine, store, self, metrics)
        self.health = self._worker.health
        self._supervisor = Supervisor(self._registry, self)
        self._slot: Slot | None = None
        self._executor_id = ""
        self._last_sweep = -SWEEP_SECONDS
        # For each job that this process holds but does not run: the time when this was first found.
        self._stuck: dict[str, float] = {}

    # ---- life cycle ----

    def start(self, *, worker: bool = True) -> None:
        """Start DBOS, the supervisor and the worker.

        Parameters
        ----------
        worker : bool
            Run jobs, one at a time. If False, jobs can only be submitted and followed.
        """
        self._slot = self._store.acquire_slot()
        self._store.sweep()
        self._executor_id = f"{self._slot.name}-{secrets.token_hex(4)}"
        enable_write_ahead_log(self._database)
        _configure_dbos_log()
        DBOS(
            config=DBOSConfig(
                name="counterpart",
                system_database_url=self._database_url,
                application_version=STEPS_VERSION,
                executor_id=self._executor_id,
                serializer=DBOSPortableJSONSerializer(),
                log_level="WARNING",
            )
        )

        # DBOS does not limit the attempts. `_run_recorded_step` does, because it distinguishes crashes from restarts.
        @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
        def analyse_scan(job: str, request: dict[str, Any]) -> dict[str, Any]:
            return self._run_job(job, AnalysisRequest(**request))

        if not worker:
            DBOS.listen_queues([])
        DBOS.launch()
        self._registry.create_tables()
        self.queue.deliveries.create_table()
        self.queue.reviews.create_table()
        self.queue.instances.create_tables()
        self.queue.trail.create_tables()
        # This process holds the lock of its slot, so all earlier processes of the slot have ended.
        self.queue.deliveries.release_claims(f"{self._slot.name}-")
        self._supervisor.start(self._executor_id if worker else None, slot_prefix=f"{self._slot.name}-")
        DBOS.register_queue(
            QUEUE, worker_concurrency=1, polling_interval_sec=POLLING_SECONDS, on_conflict="always_update"
        )

    def stop(self, drain_seconds: float) -> None:
        """Wait for the running job for a while, then return it to the queue for another worker or the next start."""
        self._worker.stop(drain_seconds)
        self._supervisor.stop()
        DBOS.destroy()
        # This comes after the end of the queue's thread. The thread would claim the job again.
        client = DBOSClient(system_database_url=self._database_url, serializer=DBOSPortableJSONSerializer())
        try:
            for status in client.list_workflows(name=WORKFLOW, status="PENDING", executor_id=self._executor_id):
                client.resume_workflow(status.workflow_id, queue_name=QUEUE)
        finally:
            client.destroy()
        self._registry.remove_worker(self._executor_id)
        self._database.dispose()
        self._engine.close()
        if self._slot is not None:
            self._slot.release()
            self._slot = None

    @property
    def process_name(self) -> str:
        """Name of this process among all that share the database. Empty before the start."""
        return self._executor_id

    # ---- JobRecovery, for the supervisor ----

    def find_busy_workers(self) -> set[str]:
        """Return the names of the workers that hold a job."""
        pending = list_workflows(status="PENDING", load_output=False)
        return {status.executor_id for status in pending if status.executor_id}

    def requeue_jobs(self, worker: str) -> list[str]:
        """Put the jobs of a dead worker back into the queue, and return their ids.

        If two processes do this at once, each job is requeued once.
        """
        self._restart_outdated_jobs(dead_worker=worker)
        pending = list_workflows(status="PENDING", executor_id=worker, load_output=False)
        jobs = [status.workflow_id for status in pending]
        self._registry.record_crash(worker, jobs)
        self._registry.lower_priority(jobs)
        # Unlike `resume_workflow`, this skips jobs that another worker has claimed in the meantime.
        DBOS._recover_pending_workflows([worker])
        return jobs

    def requeue_stuck_jobs(self) -> None:
        """Put jobs that the database gives to this process, but that it does not run, back into the queue.

        For example, the outcome of a job could not be recorded on a full disk. The job is then repeated from its last
        recorded step. The time limit covers the moments between the claim of a job and its start.
        """
        pending = list_workflows(status="PENDING", executor_id=self._executor_id, load_output=False)
        running, now = find_running_jobs(), time.monotonic()
        jobs = [status.workflow_id for status in pending if status.workflow_id not in running]
        self._stuck = {job: self._stuck.get(job, now) for job in jobs}
        for job, since in self._stuck.items():
            if now - since > STUCK_SECONDS:
                return_job(self._database, job, self._executor_id, None)
                log.warning("stuck job returned to the queue", job=job)

    def enforce_retention(self) -> None:
        """Erase expired jobs and orphaned uploads, and restart queued jobs of other versions of the steps."""
        self._restart_outdated_jobs()
        self._erase_expired()
        self.queue.reviews.remove_orphans()
        self.queue.instances.remove_orphans()
        truncate_write_ahead_log(self._database)
        if time.monotonic() - self._last_sweep >= SWEEP_SECONDS:
            self._last_sweep = time.monotonic()
            self._remove_orphaned_uploads()
            for status in list_workflows(status="CANCELLED", load_output=False):
                self._store.discard_all_but_scan(status.workflow_id)

    def _erase_expired(self) -> None:
        """Erase expired jobs, except those whose results are not delivered yet."""
        ended_statuses = [name for name, state in STATES.items() if state in ENDED_STATES]
        ended = [to_job(status) for status in list_workflows(status=ended_statuses, load_output=False)]
        # This comes after the list: the deliveries of a job are planned before it ends.
        undelivered = self.queue.deliveries.find_undelivered()
        sizes = self._store.sizes() if self._limits.keep_gb else {}
        # The sizes of undelivered jobs do not count, or every other job would be erased in their place.
        delivered_sizes = {job: size for job, size in sizes.items() if job not in undelivered}
        expired = select_expired([job for job in ended if job.id not in undelivered], delivered_sizes, self._limits)
        for job in expired:
            with suppress(errors.NotFound):  # another process has erased it
                self.queue.erase(job)
            sizes.pop(job, None)
        kept = select_expired([job for job in ended if job.id in undelivered], sizes, self._limits)
        if kept:
            event = f"expired jobs kept until their results are delivered: {len(kept)}"  # the log has no key for it
            log.warning(event)

    def finish_erasures(self) -> None:
        """Finish erasures that a fault or the death of a process interrupted."""
        for job in self._store.unfinished_erasures():
            self.queue.finish_erasure(job)

    def _restart_outdated_jobs(self, dead_worker: str | None = None) -> None:
        for job in restart_outdated_jobs(self._database, WORKFLOW, STEPS_VERSION, dead_worker):
            log.info("job restarted from its first step", job=job)

    def _remove_orphaned_uploads(self) -> None:
        """Remove uploads whose process died before it wrote their row. They were never acknowledged."""
        for job in self._store.orphaned(time.time() - STALE_SECONDS):
            if not list_workflows(workflow_ids=[job], load_output=False):
                self._store.erase(job)
                log.info("orphaned upload removed", job=job)

    # ---- JobControl, for the worker ----

    def is_assigned(self, job: str) -> bool:
        """Return whether this worker still has the job: it was not cancelled, erased or given to another worker."""
        held = list_workflows(workflow_ids=[job], status="PENDING", executor_id=self._executor_id, load_output=False)
        return bool(held)

    def record_progress(self, job: str, stage: str, progress: float) -> None:
        """Record the stage of a job and its progress, 0 to 1."""
        DBOS.update_workflow_attributes(job, {"stage": stage, "progress": progress}, merge=True)

    def check_database(self) -> None:
        """Write to the database, and raise the error if that fails."""
        self._registry.send_heartbeat(self._executor_id)

    def record_child_crash(self, job: str) -> int:
        """Record that the child process died while it ran this job.

        Returns
        -------
        int
            Number of crashes of the job if it is quarantined now, else 0.
        """
        self._registry.record_child_crash(self._executor_id, job)
        return self._quarantine(job)

    # ---- workflow ----

    def _run_job(self, job: str, request: AnalysisRequest) -> dict[str, Any]:
        """Run a job. If the service is at fault, put the job back into the queue and pause the worker.

        Raises
        ------
        PortableWorkflowError
            The job has failed. DBOS records the problem.
        Interrupted
            The job has no outcome yet.
        """
        try:
            self._worker.health.check()
            output = self._run_steps(job, request)
        except PortableWorkflowError:
            raise
        except (DBOSBaseException, Interrupted):
            self._discard_if_cancelled(job)
            raise
        except ServiceFault as fault:
            error = fault.error
        except Exception as unexpected:  # noqa: BLE001  # no failure of the service is an outcome of the job
            error = to_fault(unexpected)
        else:
            self._worker.reset_pause()
            return output
        self._metrics.faults.labels(error.code).inc()
        # A worker that pauses when it claims a job has not tried it.
        tried = error is not self._worker.health.fault
        try:
            faults = return_job(self._database, job, self._executor_id, error.code if tried else None)
        except Exception as failure:  # noqa: BLE001  # `requeue_stuck_jobs` returns the job after the pause
            log.warning("job not returned", job=job, **error_location(failure))
        else:
            if faults >= MAX_FAULTS:
                self._raise_problem(job, {"problem": error.problem})
            log.warning("job returned to the queue", job=job, code=error.code, faults=faults)
        self._worker.pause(error)
        raise Interrupted

    def _run_steps(self, job: str, request: AnalysisRequest) -> dict[str, Any]:
        """Run the steps of a job. DBOS returns the output of a recorded step without running it again."""
        with self._worker.start_attempt(job, request) as attempt:
            inferred = self._run_step("infer", job, attempt.infer)
            self._raise_problem(job, inferred)
            name = str(inferred["inferred"])
            exported = self._run_step("export", job, lambda: attempt.export(name))
            self._raise_problem(job, exported)
            DBOS.run_step({"name": "publish"}, self._publish, job, str(exported["work"]))
            routes = self._router and self._router(str(exported["model"]), cast("list[str]", exported["results"]))
            if routes:
                DBOS.run_step({"name": "route"}, self._plan_deliveries, job, [list(route) for route in routes])
        self._metrics.outcomes.labels("succeeded").inc()
        # An older version may have recorded the export, without a summary.
        output = {name: exported.get(name) for name in ("model", "results", "summary")}
        return output | {"is_routed": self._router is not None}

    def _run_step(self, name: str, job: str, step: Callable[[], StepOutput]) -> StepOutput:
        """Run and record a step of a job, or return its recorded output."""
        return DBOS.run_step({"name": name}, self._run_recorded_step, name, job, step)

    def _publish(self, job: str, work: str) -> None:
        """Publish staged results, unless the job was cancelled. Whatever comes last removes the results."""
        with self._trace_step("publish", job), self._as_service_fault(job):
            if not self.is_assigned(job):
                raise Interrupted
            self._store.publish(job, work)
            if self.queue.is_cancelled(job):
                raise Interrupted  # `_run_job` discards the results

    def _plan_deliveries(self, job: str, routes: list[list[str]]) -> None:
        with self._as_service_fault(job):
            self.queue.deliveries.plan(job, [(target, result) for target, result in routes])

    def _discard_if_cancelled(self, job: str) -> None:
        """Remove what a cancelled job wrote after `JobQueue.cancel` removed its files."""
        with suppress(Exception):  # `enforce_retention` repeats it
            if self.queue.is_cancelled(job):
                self._store.discard_all_but_scan(job)

    def _run_recorded_step(self, name: str, job: str, step: Callable[[], StepOutput]) -> StepOutput:
        """Run a step, and record its problem or model for `JobFilter`."""
        with self._trace_step(name, job) as span, self._as_service_fault(job):
            output = self._run_step_once(job, step)
            problem = cast("dict[str, str] | None", output.get("problem"))
            span.attributes["counterpart.outcome"] = problem["code"] if problem else "succeeded"
            return output

    @contextmanager
    def _trace_step(self, name: str, job: str) -> Iterator[Span]:
        """Record a span of a step. An interrupted step is not a failure."""
        title = f"job {name}"
        with self._traces.span(title) if self._traces else nullcontext(Span(title)) as span:
            span.attributes = {"counterpart.job": job, "counterpart.step": name}
            try:
                yield span
            except Interrupted:
                span.attributes["counterpart.outcome"] = "interrupted"
                raise

    def _run_step_once(self, job: str, step: Callable[[], StepOutput]) -> StepOutput:
        crashes = self._quarantine(job)
        output: StepOutput = {"problem": quarantine_problem(job, crashes)} if crashes else step()
        problem = cast("dict[str, str] | None", output.get("problem"))
        if problem:
            DBOS.update_workflow_attributes(job, {"code": problem["code"]}, merge=True)
        elif "model" in output:
            DBOS.update_workflow_attributes(job, {"model": output["model"]}, merge=True)
        return output

    @contextmanager
    def _as_service_fault(self, job: str) -> Iterator[None]:
        """Replace every exception by a fault of the service. DBOS would record it as the output of the step.

        Raises
        ------
        ServiceFault
        Interrupted
            The job was cancelled, erased or given to another worker, which explains the exception.
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001  # see above
            with suppress(Exception):
                if self._store.is_erased(job) or not self.is_assigned(job):
                    raise Interrupted from None
            raise ServiceFault(to_fault(error)) from None

    def _raise_problem(self, job: str, output: StepOutput) -> None:
        """Fail the workflow if a step's output has a problem."""
        if "problem" not in output:
            return
        # If the store does not answer, the intermediate files stay until the job is erased.
        with suppress(errors.StoreUnavailable, OSError):
            self._store.discard_intermediate(job)
        problem = cast("dict[str, str]", output["problem"])
        self._metrics.outcomes.labels(problem["code"]).inc()
        raise PortableWorkflowError(problem["title"], "CounterpartError", problem["code"], dict(problem))

    def _quarantine(self, job: str) -> int:
        """Return the number of crashes of a job if it is quarantined, and delete their records, else 0."""
        if not self._registry.is_quarantined(job):
            return 0
        crashes = self._registry.count_crashes(job)
        self._registry.delete_crash_records(job)
        return crashes


def find_running_jobs() -> set[str]:
    """Return the jobs that this process runs, from before their first step until their outcome is recorded.

    DBOS has no call for it.
    """
    return set(_get_dbos_instance()._active_workflows_set.activeList())


def _configure_dbos_log() -> None:
    """Send DBOS's log to the handlers of this process, without the exceptions that are the outcome of a job."""
    logger = logging.getLogger("dbos")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # otherwise DBOS adds a handler that prints exceptions
        logger.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], PortableWorkflowError)))
