"""Hand-over of received series to the queue: each series becomes a job exactly once, also after kill -9.

A batch has a random name, which the job's row keeps. A process that dies between the submission and its record
finds the job by this name at the next start, whatever became of the job. See decision 25.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import structlog

from app.analysis import AnalysisRequest
from app.errors import CounterpartError, NotFound, error_location
from app.jobs.audit import BEGUN, AuditEntry
from app.jobs.job import Job
from app.jobs.queue import JobQueue
from app.jobs.store import Store, Upload
from app.pacs.incomplete import TransferFaults
from app.pacs.metrics import NodeMetrics
from app.pacs.spool import Batch, HandedSeries, Sender, Spool, hash_file

log = structlog.get_logger("counterpart.node")

TICK_SECONDS = 0.25
# Seconds between two searches for erased jobs and interrupted transfers.
SWEEP_SECONDS = 30.0
# Jobs in one query of this search. Databases limit the parameters of a statement.
QUERIED_JOBS = 500
# Pause after a submission that failed, for example because the queue is full. It doubles until one succeeds.
RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 30.0
# A job in one of these states is never the answer to the same content again.
NOT_REUSED = ("failed", "cancelled")
# Outcome in the audit trail of a series that is a job.
ACCEPTED = "accepted"
# Sender of a series that an older version received.
UNKNOWN_SENDER = Sender("unknown", "")
ERASED_NOTE = "An earlier part of this series, or the whole series, was erased with its job."
REFUSED_NOTE = "The DICOM node refused {count} of the images of this series. The series may be incomplete."
INTERRUPTED_NOTE = "An association that sent this series did not end normally. The series may be incomplete."

DEFAULT_REQUEST = AnalysisRequest()


class HandOver:
    """Thread that makes jobs of the series that are complete.

    Parameters
    ----------
    spool : Spool
    queue : JobQueue
    store : Store
    metrics : NodeMetrics
    quiet_seconds : float
        Seconds without an instance after which a series is complete.
    request : AnalysisRequest
        Options of every job.
    """

    def __init__(
        self,
        spool: Spool,
        queue: JobQueue,
        store: Store,
        metrics: NodeMetrics,
        quiet_seconds: float,
        request: AnalysisRequest = DEFAULT_REQUEST,
    ) -> None:
        self._spool = spool
        self._queue = queue
        self._store = store
        self._metrics = metrics
        self._quiet_seconds = quiet_seconds
        self._request = request
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hand-over", daemon=True)
        self._pause = RETRY_SECONDS
        self._not_before = self._last_sweep = float("-inf")
        # Batches whose begin is in the audit trail. They are tried again until they are jobs.
        self._begun: set[str] = set()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread after the submission that is under way."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(TICK_SECONDS):
            if time.monotonic() < self._not_before:
                continue
            try:
                self.run_once()
                self._pause = RETRY_SECONDS
            except Exception as error:  # noqa: BLE001  # nothing is lost: the series stays on disk and is tried again
                code = error.code if isinstance(error, CounterpartError) else None
                log.warning("series not handed over yet", code=code, **error_location(error))
                self._not_before = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, MAX_RETRY_SECONDS)

    def run_once(self) -> None:
        """Hand over every series that is complete.

        Raises
        ------
        QueueFull, StoreFull, StoreUnavailable
            The rest is handed over later.
        """
        failures: list[Exception] = []
        # A batch is never two jobs, so the batches of a killed process come first.
        for batch in self._spool.batches():
            with _collect(failures):
                self._hand_over(batch)
        for key in self._spool.quiet_series(self._quiet_seconds):
            self._queue.check_capacity(0)  # as long as the queue is full, the series may still grow
            with _collect(failures):
                self._hand_over(self._spool.take(key))
        if time.monotonic() - self._last_sweep > SWEEP_SECONDS:
            self._last_sweep = time.monotonic()
            self._spool.remove_stale()
            self._forget_erased_jobs()
        if failures:
            raise failures[0]

    def _hand_over(self, batch: Batch) -> None:
        handed = self._spool.read_handed(batch.series)
        if handed is not None and handed.batch == batch.name:  # the process died before it removed the batch
            self._spool.discard(batch)
            return
        if batch.name not in self._begun:
            self._audit(batch, BEGUN, None)
            self._begun.add(batch.name)
        previous = self._find(handed.job) if handed is not None else None
        instances = {path.name: hash_file(path) for path in batch.files}
        # The images of an erased job are not in the new one.
        earlier = handed.instances if handed is not None and previous is not None else {}
        faults = self._spool.read_faults(batch.series)
        caution = _describe(faults)
        # A job that says something else about missing images is not the answer to these.
        is_same_caution = handed is not None and handed.caution == caution
        job = self._queue.find_reference(batch.name)
        if job is None and previous is not None and is_same_caution and _is_repeated(previous, earlier, instances):
            self._metrics.series.labels("repeated").inc()
            job = previous.id
        if job is None:
            is_erased = handed is not None and previous is None
            note = ERASED_NOTE if is_erased else ""
            job = self._submit(batch, previous, earlier, instances, note=note, caution=caution)
        self._audit(batch, ACCEPTED, job)
        self._begun.discard(batch.name)
        self._spool.finish(batch, HandedSeries(batch.name, job, {**earlier, **instances}, caution))
        log.info("series handed over", job=job, instances=len(instances))
        if caution:
            log.warning("series may be incomplete", job=job, refused=faults.refused)

    def _audit(self, batch: Batch, outcome: str, job: str | None) -> None:
        """Write a row of the audit trail for each sender. If this fails, the batch is tried again."""
        for sender in self._spool.read_senders(batch.series) or (UNKNOWN_SENDER,):
            self._queue.audit(AuditEntry(f"dicom:{sender.title}", "send", outcome, job, sender.address or None))

    def _submit(
        self,
        batch: Batch,
        previous: Job | None,
        earlier: dict[str, str],
        instances: dict[str, str],
        *,
        note: str,
        caution: str,
    ) -> str:
        """Submit the images of a batch, with those of the last job of the series that the batch does not contain."""
        added = len(instances.keys() - earlier.keys())
        with self._store.receive_upload() as upload:
            for path in batch.files:
                upload.add_file(path)
            if previous is not None:
                self._add_earlier(upload, previous, {d for key, d in earlier.items() if key not in instances})
                if added:
                    note = (
                        f"The series arrived in parts. Job {previous.id} analysed it without {added} of these images."
                    )
            request = replace(self._request, note=" ".join(filter(None, (caution, note))))
            # With a key, a job of the same content without the caution is not the answer.
            job = self._queue.submit(upload, request, batch.name if caution else None, reference=batch.name)
        self._metrics.series.labels("late" if note else "new").inc()
        return job

    def _add_earlier(self, upload: Upload, previous: Job, digests: set[str]) -> None:
        """Add the files of a job's scan that have one of these hashes."""
        if not digests:
            return
        with self._open_scan(previous.id) as files:
            for path in files:
                if hash_file(path) in digests:
                    upload.add_file(path)

    @contextmanager
    def _open_scan(self, job: str) -> Iterator[list[Path]]:
        """Yield the files of a job's scan, and remove local copies at the end."""
        try:
            path = self._store.scan_path(job)
            yield sorted(path.iterdir()) if path.is_dir() else [path]
        finally:
            self._store.cleanup(job)

    def _find(self, job: str) -> Job | None:
        try:
            return self._queue.get(job)
        except NotFound:
            return None

    def _forget_erased_jobs(self) -> None:
        handed = dict(self._spool.handed_jobs())
        jobs = sorted(set(handed.values()))
        parts = (jobs[start : start + QUERIED_JOBS] for start in range(0, len(jobs), QUERIED_JOBS))
        known = {job for part in parts for job in self._queue.read_states(part)}
        for key, job in handed.items():
            if job not in known:
                self._spool.forget(key)


@contextmanager
def _collect(failures: list[Exception]) -> Iterator[None]:
    """Keep a failure, which `run_once` raises. It must not delay the series behind it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        failures.append(error)


def _describe(faults: TransferFaults) -> str:
    """Return the sentences that say why a series may be incomplete; empty if nothing indicates that."""
    refused = REFUSED_NOTE.format(count=faults.refused) if faults.refused else ""
    return " ".join(filter(None, (refused, INTERRUPTED_NOTE if faults.interrupted else "")))


def _is_repeated(previous: Job, earlier: dict[str, str], instances: dict[str, str]) -> bool:
    """Return whether a job has all images of a batch already, and may be the answer to them."""
    return instances.items() <= earlier.items() and previous.state not in NOT_REUSED
