"""Worker: one attempt at the steps of a job, with progress, cancellation and draining."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Protocol

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.analysis import AnalysisRequest, Progress
from app.errors import (
    Cancelled,
    CounterpartError,
    DamagedBundle,
    InternalError,
    NotReady,
    ProviderUnavailable,
    WorkerLost,
    error_location,
    scan_out_of_memory,
)
from app.export.outputs import OPTIONAL_NAMES, REQUIRED_NAMES
from app.export.report import Report
from app.jobs.engine import INFERENCE_FILE, ChildProcessDied, Engine
from app.jobs.faults import ServiceFault, find_service_fault
from app.jobs.job import ResultSummary
from app.jobs.metrics import Metrics
from app.jobs.store import Store

log = structlog.get_logger("counterpart.jobs")

# Seconds between two checks for cancellation. A cancelled scan frees its worker within a second: this time plus the
# waits in `app.jobs.subprocess_engine`.
CHECK_SECONDS = 0.2
# Seconds between two records of the progress, each of which writes to the database.
PROGRESS_SECONDS = 1.0
# Start and end of each stage as fractions of the whole job. The inference takes nearly all of the time.
STAGE_RANGES = {"read": (0.0, 0.05), "infer": (0.05, 0.95), "export": (0.95, 1.0)}
# Pause of the worker after a fault of the service. It doubles until a job succeeds, and until a check succeeds.
PAUSE_SECONDS = 2.0
MAX_PAUSE_SECONDS = 60.0
# Faults that only another inference disproves.
ENGINE_ERRORS = (DamagedBundle, NotReady, ProviderUnavailable)
# The recorded output of a step.
StepOutput = dict[str, object]


class Interrupted(BaseException):
    """Stop of a step without an output, because its job was cancelled or erased, or continues at the next start.

    Not an Exception, so that neither the pipeline nor the workflow treats it as a failure.
    """


class WorkerHealth:
    """The fault of the service that pauses the worker of this process, if there is one.

    Attributes
    ----------
    fault : CounterpartError or None
    """

    def __init__(self) -> None:
        self.fault: CounterpartError | None = None

    def check(self) -> None:
        """Raise the fault, if there is one.

        Raises
        ------
        CounterpartError
        """
        if (fault := self.fault) is not None:
            raise fault


class JobControl(Protocol):
    """Operations on the records of jobs that the worker needs."""

    def is_assigned(self, job: str) -> bool:
        """Return whether this worker still has the job: it was not cancelled, erased or given to another worker."""

    def record_progress(self, job: str, stage: str, progress: float) -> None:
        """Record the stage of a job and its progress, 0 to 1."""

    def check_database(self) -> None:
        """Write to the database, and raise the error if that fails."""

    def record_child_crash(self, job: str) -> int:
        """Record that the child process died while it ran this job.

        Returns
        -------
        int
            Number of crashes of the job if it is quarantined now, else 0.
        """


class Worker:
    """Runs one job at a time until the process shuts down.

    Parameters
    ----------
    engine : Engine
    store : Store
    state : JobControl
    metrics : Metrics

    Attributes
    ----------
    health : WorkerHealth
    """

    def __init__(self, engine: Engine, store: Store, state: JobControl, metrics: Metrics) -> None:
        self.health = WorkerHealth()
        self._engine = engine
        self._store = store
        self._state = state
        self._metrics = metrics
        self._draining = Event()
        self._stopping = Event()
        self._idle = Event()
        self._idle.set()
        self._faults_in_a_row = 0

    @contextmanager
    def start_attempt(self, job: str, request: AnalysisRequest) -> Iterator["Attempt"]:
        """Yield an attempt at a job, and remove its local files at the end.

        Raises
        ------
        Interrupted
            The process shuts down, so no new attempt starts.
        """
        if self._draining.is_set():
            # As long as this worker holds the job, the queue does not give it the next one.
            self._stopping.wait()
            raise Interrupted
        self._idle.clear()
        self._metrics.busy.set(1)
        attempt = Attempt(job, request, self._engine, self._store, self._state, self._metrics, self._stopping)
        try:
            yield attempt
        finally:
            attempt.cleanup()
            self._metrics.busy.set(0)
            self._idle.set()

    def pause(self, fault: CounterpartError) -> None:
        """Block until the service can analyse scans again, or shuts down.

        The thread that calls this method has a place of the queue, so that this worker claims no other job meanwhile.

        Parameters
        ----------
        fault : CounterpartError
            The fault that ended the last attempt. `health` shows it, or the fault of the last check.
        """
        self.health.fault = fault
        self._metrics.paused.set(1)
        self._faults_in_a_row += 1
        seconds = min(PAUSE_SECONDS * 2 ** (self._faults_in_a_row - 1), MAX_PAUSE_SECONDS)
        log.error("worker paused", code=fault.code, seconds=seconds)
        while not self._draining.wait(seconds):
            try:
                self._store.check()
                self._state.check_database()
                if isinstance(self.health.fault, ENGINE_ERRORS):
                    self._engine.warm_up()
            except Exception as error:  # noqa: BLE001  # the next check may succeed
                self.health.fault = to_fault(error)
                seconds = min(seconds * 2, MAX_PAUSE_SECONDS)
            else:
                log.info("worker continues")
                break
        self.health.fault = None
        self._metrics.paused.set(0)

    def reset_pause(self) -> None:
        """Begin with the shortest pause at the next fault, because a job has succeeded."""
        self._faults_in_a_row = 0

    def stop(self, drain_seconds: float) -> None:
        """Wait for the running job for a while, then interrupt it. It continues at the next start."""
        self._draining.set()
        self._idle.wait(drain_seconds)
        self._stopping.set()
        # A network evaluation cannot be interrupted. It ends within seconds.
        self._idle.wait(CHECK_SECONDS + 5)


@dataclass(eq=False)
class Attempt:
    """One worker's attempt at the remaining steps of a job.

    Attributes
    ----------
    job : str
    request : AnalysisRequest
    engine, store, state, metrics
        See `Worker`.
    stopping : Event
        Set when the attempt must stop.
    scan, work : Path or None
        Path of the scan and folder of the results. If both steps run in this attempt, they share the folder, and the
        engine exports from memory.
    """

    job: str
    request: AnalysisRequest
    engine: Engine
    store: Store
    state: JobControl
    metrics: Metrics
    stopping: Event
    scan: Path | None = None
    work: Path | None = None

    def infer(self) -> StepOutput:
        """Run the inference and save its result in the store.

        Returns
        -------
        dict
            `inferred`, the name of the inference result in the store, or `problem`, a `CounterpartError.problem`.

        Raises
        ------
        Interrupted
            The step has no output.
        ServiceFault
            The service, not the scan, is the cause.
        """
        return self._retry_step(self._infer)

    def export(self, inferred: str) -> StepOutput:
        """Write the results into a folder from which any worker can publish them.

        Parameters
        ----------
        inferred : str
            Name of the inference result, from this or another worker.

        Returns
        -------
        dict
            `work`, the name of the folder, `model`, the id of the model, `results`, the names of the files, and
            `summary`, the fields of `ResultSummary`, or `problem`.

        Raises
        ------
        Interrupted, ServiceFault
            See `infer`.
        """
        return self._retry_step(lambda: self._export(inferred))

    def cleanup(self) -> None:
        """Remove the files of this attempt, which can include an unpacked scan."""
        if self.work is not None:
            shutil.rmtree(self.work, ignore_errors=True)
        self.work = self.scan = None
        self.store.cleanup(self.job)

    def _retry_step(self, step: Callable[[], StepOutput]) -> StepOutput:
        """Return the output of a step or its problem. Repeat the step if the child process died."""
        start = time.perf_counter()
        while True:
            try:
                return step()
            except Cancelled:
                raise Interrupted from None
            except ChildProcessDied as died:
                self.cleanup()
                log.warning("child process died", job=self.job, code=str(died))
                if crashes := self.state.record_child_crash(self.job):
                    return {"problem": quarantine_problem(self.job, crashes)}
            except Exception as error:  # noqa: BLE001  # no exception may stop the queue
                # The row of an erased job goes after its files and before the record of the erasure, hence this order.
                if self.store.is_erased(self.job) or not self.state.is_assigned(self.job):
                    raise Interrupted from None
                if (fault := find_fault(error)) is not None:
                    raise ServiceFault(fault) from None
                return {"problem": self._failure_problem(error, time.perf_counter() - start)}

    def _prepare(self) -> tuple[Path, Path]:
        """Return the path of the scan and the folder of this attempt."""
        if self.work is None or self.scan is None:
            self.work = self.store.create_work_folder(self.job)
            self.scan = self.store.scan_path(self.job)
        return self.scan, self.work

    def _infer(self) -> StepOutput:
        start = time.perf_counter()
        scan, work = self._prepare()
        self.engine.infer(scan, work, self.request, self._progress())
        name = self.store.save_intermediate(self.job, work / INFERENCE_FILE)
        # A cancellation discards intermediate files after it changed the state. This check comes after the save, so
        # that one of both removes the file.
        if not self.state.is_assigned(self.job):
            self.store.discard_intermediate(self.job, name)
            raise Interrupted
        log.info("inference finished", job=self.job, seconds=round(time.perf_counter() - start, 2))
        return {"inferred": name}

    def _export(self, inferred: str) -> StepOutput:
        start = time.perf_counter()
        path = self.store.load_intermediate(self.job, inferred)
        if path is None:  # for example, the store's backup is older than the database's
            inferred = str(self._infer()["inferred"])
            path = self.store.load_intermediate(self.job, inferred)
        assert path is not None, "it was saved just now"
        scan, work = self._prepare()
        report = self.engine.export(scan, path, work, self.request, self._progress())
        staged = self.store.stage(self.job, work)
        self.work = None  # now owned by the publish step
        for stage, seconds in report.work.seconds.items():
            self.metrics.stage_seconds.labels(stage).observe(seconds)
        seconds = round(time.perf_counter() - start, 2)
        log.info("export finished", job=self.job, model=report.model.id, seconds=seconds)
        results = [name for name in (*REQUIRED_NAMES, *OPTIONAL_NAMES) if name not in report.absent]
        return {"work": staged, "model": report.model.id, "results": results, "summary": asdict(summarise(report))}

    def _failure_problem(self, error: Exception, seconds: float) -> dict[str, str]:
        if isinstance(error, MemoryError):
            error = scan_out_of_memory()
        if isinstance(error, CounterpartError):
            log.info("job failed", job=self.job, code=error.code, seconds=round(seconds, 2))
            return error.problem
        location = error_location(error)
        internal = _internal_error(location)
        log.error("job failed", job=self.job, code=internal.code, seconds=round(seconds, 2), **location)
        return internal.problem

    def _progress(self) -> Progress:
        """Return a callback that checks for cancellation and records the progress, both at limited rates."""
        current_stage, last_check, last_record = "", 0.0, 0.0

        def progress(stage: str, fraction: float) -> None:
            nonlocal current_stage, last_check, last_record
            if self.stopping.is_set():
                raise Interrupted
            now, is_new_stage = time.monotonic(), stage != current_stage
            if is_new_stage or now - last_check >= CHECK_SECONDS:
                last_check = now
                if not self.state.is_assigned(self.job):
                    raise Interrupted
            if is_new_stage or now - last_record >= PROGRESS_SECONDS:
                current_stage, last_record = stage, now
                begin, end = STAGE_RANGES[stage]
                done = begin + (end - begin) * min(max(fraction, 0.0), 1.0)
                self.state.record_progress(self.job, stage, round(done, 3))

        return progress


def summarise(report: Report) -> ResultSummary:
    """Return the numbers of a report that lists show."""
    return ResultSummary(report.lesion_volume_ml, len(report.findings), report.scores.scan, len(report.warnings))


def find_fault(error: Exception) -> CounterpartError | None:
    """Return the fault of the service that caused an exception, or None if the scan may be the cause."""
    if isinstance(error, SQLAlchemyError):
        return NotReady(
            f"The job database failed ({type(error).__name__}).",
            expected="a database that can be read and written.",
            advice="Check COUNTERPART_DATABASE, or the disk of COUNTERPART_STORE. The scan is tried again.",
        )
    return find_service_fault(error)


def to_fault(error: Exception) -> CounterpartError:
    """Return an exception that was raised outside the analysis of a scan as a fault of the service."""
    if (fault := find_fault(error)) is not None:
        return fault
    if isinstance(error, CounterpartError):
        return error
    location = error_location(error)
    log.error("unexpected fault", **location)
    return _internal_error(location)


def _internal_error(location: dict[str, str]) -> InternalError:
    return InternalError(
        f"The analysis met an unexpected {location['exception']}.",
        expected="a result, or an error with a reason.",
        advice="Send the scan again. If it fails again, report the id of the job: the log has the location.",
    )


def quarantine_problem(job: str, crashes: int) -> dict[str, str]:
    """Log and return the problem of a job that is quarantined after a number of crashes."""
    log.error("job failed", job=job, code=WorkerLost.code)
    return WorkerLost(
        f"The process that analysed this scan died {crashes} times.",
        expected="a result, or an error with a reason.",
        advice="The machine may be short of memory. Report the id of the job. Other scans are not affected.",
    ).problem
