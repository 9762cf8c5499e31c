"""One job in the worker: infer, export, stop when nobody wants the result."""

import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Protocol

import structlog

from app.analysis import AnalysisRequest
from app.errors import Cancelled, CounterpartError, InternalError, OutOfMemory, WorkerLost
from app.export.outputs import OPTIONAL_NAMES, REQUIRED_NAMES
from app.jobs.engine import INFERRED, Engine, ProcessDied, Unexpected
from app.jobs.metrics import Metrics
from app.jobs.store import Store

log = structlog.get_logger("counterpart.jobs")

# Seconds between two looks at whether the job is still wanted. A cancelled scan lets go of its worker within a second:
# this, and what `app.jobs.apart` waits for its child.
CHECK_SECONDS = 0.2
# Seconds between two notes of the progress: each is a write to the database.
NOTE_SECONDS = 1.0
# Where each stage begins and ends in the whole job; inference takes nearly all of the time.
SHARES = {"read": (0.0, 0.05), "infer": (0.05, 0.95), "export": (0.95, 1.0)}
# What a step of a job records.
Outcome = dict[str, object]


class Interrupted(BaseException):
    """Stop now and record nothing: the job was cancelled or erased, or goes on at the next start.

    Not an Exception, so that neither the pipeline nor the workflow takes it for a failure.
    """


class Ledger(Protocol):
    """What the runner needs of whoever keeps the jobs."""

    def wanted(self, job: str) -> bool:
        """False once the job was cancelled or erased."""

    def note(self, job: str, stage: str, progress: float) -> None:
        """Keep how far a job is."""

    def suspected(self, job: str) -> bool:
        """Whether a worker died with this job before."""

    def killed(self, job: str) -> int:
        """Keep that a job ended the process of its analysis; how many it has ended where it is to blame, else 0."""


class Runner:
    """Runs jobs, one at a time, until the process is asked to end.

    Parameters
    ----------
    engine : Engine
    store : Store
    ledger : Ledger
    metrics : Metrics
    """

    def __init__(self, engine: Engine, store: Store, ledger: Ledger, metrics: Metrics) -> None:
        self._engine = engine
        self._store = store
        self._ledger = ledger
        self._metrics = metrics
        self._draining = Event()
        self._stopping = Event()
        self._idle = Event()
        self._idle.set()

    @contextmanager
    def begin(self, job: str, request: AnalysisRequest) -> Iterator["Attempt"]:
        """What this worker does for one job; what it alone needed is gone in the end.

        Raises
        ------
        Interrupted
            The process is asked to end: nothing is begun any more.
        """
        if self._draining.is_set():
            # Holding on to it keeps the queue from handing out the next one.
            self._stopping.wait()
            raise Interrupted
        self._idle.clear()
        attempt = Attempt(job, request, self._engine, self._store, self._ledger, self._metrics, self._stopping)
        try:
            yield attempt
        finally:
            attempt.let_go()
            self._idle.set()

    def stop(self, drain_seconds: float) -> None:
        """Let the running job end, for a while; then leave it to the next start."""
        self._draining.set()
        self._idle.wait(drain_seconds)
        self._stopping.set()
        # A network evaluation cannot be broken off: it ends within seconds.
        self._idle.wait(CHECK_SECONDS + 5)


@dataclass(eq=False)
class Attempt:
    """One worker's work on one job, or on what is left to do of it.

    Attributes
    ----------
    job : str
    request : Request
    engine, store, ledger, metrics
        As of `Runner`.
    stopping : Event
        Set when there is no more time.
    scan, work : Path or None
        What is read, and the folder that both steps write into where this worker takes both: the engine then goes
        on from memory.
    """

    job: str
    request: AnalysisRequest
    engine: Engine
    store: Store
    ledger: Ledger
    metrics: Metrics
    stopping: Event
    scan: Path | None = None
    work: Path | None = None

    def infer(self) -> Outcome:
        """Ask the networks.

        Returns
        -------
        dict
            `inferred`, what the store keeps of it; or `problem`, `CounterpartError.problem`.

        Raises
        ------
        Interrupted
            Nothing is to be recorded.
        """
        return self._surviving(self._infer)

    def export(self, inferred: str) -> Outcome:
        """Write the results into a folder aside, where any worker can publish them.

        Parameters
        ----------
        inferred : str
            What `infer` returned, here or elsewhere.

        Returns
        -------
        dict
            `work`, the folder's name, `model`, and `results`, the files' names; or `problem`.

        Raises
        ------
        Interrupted
            Nothing is to be recorded.
        """
        return self._surviving(lambda: self._export(inferred))

    def let_go(self) -> None:
        """Remove what only this attempt needed; an unpacked scan may lie in it."""
        if self.work is not None:
            shutil.rmtree(self.work, ignore_errors=True)
        self.work = self.scan = None
        self.store.let_go(self.job)

    def _surviving(self, step: Callable[[], Outcome]) -> Outcome:
        """What a step returns, or the problem that it met; begun again where it ended the engine's process."""
        start = time.perf_counter()
        while True:
            try:
                return step()
            except Cancelled:
                raise Interrupted from None
            except ProcessDied as died:
                self.let_go()
                log.warning("analysis died", job=self.job, code=str(died))
                if lost := self.ledger.killed(self.job):
                    return {"problem": lost_workers(self.job, lost)}
            except Exception as error:  # noqa: BLE001  # whatever happens, the queue goes on
                if not self.ledger.wanted(self.job):
                    raise Interrupted from None
                return {"problem": self._failed(error, time.perf_counter() - start)}

    def _prepare(self) -> tuple[Path, Path]:
        """The scan, and the folder that this attempt writes into."""
        if self.work is None or self.scan is None:
            self.work = self.store.work(self.job)
            self.scan = self.store.scan(self.job)
        self.engine.guard(on=self.ledger.suspected(self.job))
        return self.scan, self.work

    def _infer(self) -> Outcome:
        start = time.perf_counter()
        scan, work = self._prepare()
        self.engine.infer(scan, work, self.request, self._reporter())
        name = self.store.hold(self.job, work / INFERRED)
        # Whoever cancels looks for what is held after the job is cancelled, and this looks after it is held.
        if not self.ledger.wanted(self.job):
            self.store.release(self.job, name)
            raise Interrupted
        log.info("inferred", job=self.job, seconds=round(time.perf_counter() - start, 2))
        return {"inferred": name}

    def _export(self, inferred: str) -> Outcome:
        start = time.perf_counter()
        path = self.store.held(self.job, inferred)
        if path is None:  # the store was restored from a back-up that was made after its database's, say
            inferred = str(self._infer()["inferred"])
            path = self.store.held(self.job, inferred)
        assert path is not None, "it was just written"
        scan, work = self._prepare()
        report = self.engine.export(scan, path, work, self.request, self._reporter())
        staged = self.store.stage(self.job, work)
        self.work = None  # publishing takes it
        for stage, seconds in report.work.seconds.items():
            self.metrics.stage_seconds.labels(stage).observe(seconds)
        log.info("exported", job=self.job, model=report.model.id, seconds=round(time.perf_counter() - start, 2))
        results = [name for name in (*REQUIRED_NAMES, *OPTIONAL_NAMES) if name not in report.absent]
        return {"work": staged, "model": report.model.id, "results": results}

    def _failed(self, error: Exception, seconds: float) -> dict[str, str]:
        if isinstance(error, MemoryError):
            error = out_of_memory()
        if isinstance(error, CounterpartError):
            log.info("failed", job=self.job, code=error.code, seconds=round(seconds, 2))
            return error.problem
        fault = InternalError(
            f"The analysis met an unexpected {where(error)['exception']}.",
            expected="an analysis that ends in a result or a reason.",
            advice="Send the scan again; if it fails again, report the job's id: the log tells where it happened.",
        )
        log.error("failed", job=self.job, code=fault.code, seconds=round(seconds, 2), **where(error))
        return fault.problem

    def _reporter(self) -> Callable[[str, float], None]:
        stage_now, checked, noted = "", 0.0, 0.0

        def report(stage: str, fraction: float) -> None:
            nonlocal stage_now, checked, noted
            if self.stopping.is_set():
                raise Interrupted
            now, entered = time.monotonic(), stage != stage_now
            if entered or now - checked >= CHECK_SECONDS:
                checked = now
                if not self.ledger.wanted(self.job):
                    raise Interrupted
            if entered or now - noted >= NOTE_SECONDS:
                stage_now, noted = stage, now
                begin, end = SHARES[stage]
                self.ledger.note(self.job, stage, round(begin + (end - begin) * min(max(fraction, 0.0), 1.0), 3))

        return report


def out_of_memory() -> OutOfMemory:
    """What is told of a scan that did not fit, wherever it was found out."""
    return OutOfMemory(
        "The memory of the machine did not suffice to read, analyse or write the scan.",
        expected="memory for one scan: see Sizing in docs/operations.md.",
        advice="Send it again when less runs on this machine, or give the worker more memory.",
    )


def lost_workers(job: str, lost: int) -> dict[str, str]:
    """The problem of a job that ends its workers."""
    log.error("failed", job=job, code=WorkerLost.code)
    return WorkerLost(
        f"{lost} workers died while they analysed this scan.",
        expected="an analysis that ends in a result or a reason.",
        advice="The machine may be short of memory. Report the job's id; other scans are not affected.",
    ).problem


def where(error: BaseException) -> dict[str, str]:
    """Class and place of an exception: never its text, which may hold patient data."""
    if isinstance(error, Unexpected):
        return error.place
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"
    return {"exception": type(error).__name__, "where": place}
