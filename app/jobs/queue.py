"""Queue of analysis jobs: submit, find, list, cancel and erase them.

Each job is a DBOS workflow. `app.jobs.workflow` runs the workflows, and only these two modules import DBOS.
"""

import hashlib
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, cast

import sqlalchemy as sa
import structlog
from dbos import DBOS, EnqueueOptions, PortableWorkflowError, WorkflowStatus
from sqlalchemy.exc import SQLAlchemyError

from app import errors
from app.analysis import AnalysisRequest
from app.jobs.audit import AuditEntry, AuditTrail
from app.jobs.database import truncate_write_ahead_log, workflow_table
from app.jobs.deliveries import Deliveries
from app.jobs.engine import Engine
from app.jobs.idempotency import KeyHasher
from app.jobs.instances import InstanceIndex
from app.jobs.job import Cursor, Job, JobFilter, Order, Priority, ResultSummary, State
from app.jobs.maintenance import StorageLimits, WorkerRegistry
from app.jobs.metrics import Metrics
from app.jobs.reviews import Reviews
from app.jobs.store import Store, Upload

log = structlog.get_logger("counterpart.jobs")

WORKFLOW = "analyse_scan"
QUEUE = "scans"
JOB_ID = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
# The state of a job for each status of its DBOS workflow. A process has claimed a PENDING workflow.
STATES: dict[str, State] = {
    "DELAYED": "queued",
    "ENQUEUED": "queued",
    "PENDING": "running",
    "SUCCESS": "succeeded",
    "ERROR": "failed",
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "failed",  # set by older versions only
    "CANCELLED": "cancelled",
}
# The results of version 0.1.0, which did not record them.
FIRST_RESULTS = ("mask.nii.gz", "labels.nii.gz", "anomaly.nii.gz", "counterpart.nii.gz", "report.json", "preview.png")
QUEUED_STATUSES = [name for name, state in STATES.items() if state == "queued"]
# A failed or cancelled job is never the answer to the same content again.
REUSABLE_STATUSES = [name for name, state in STATES.items() if state not in ("failed", "cancelled")]
# DBOS runs the smallest number first, and equal numbers in order of submission. The odd numbers above these belong
# to jobs whose worker died: `WorkerRegistry.lower_priority`.
PRIORITIES: dict[Priority, int] = {"stat": 2, "routine": 10}


@dataclass(frozen=True)
class RawState:
    """Columns of a job's row that change while it is followed."""

    status: str
    attributes: Mapping[str, Any] | None

    @property
    def queued(self) -> bool:
        """Return whether the job waits in the queue."""
        return self.status in QUEUED_STATUSES


class JobQueue:
    """The jobs of a service, from submission to erasure.

    Every method blocks. Call none of them on an event loop.

    Parameters
    ----------
    engine : Engine
        Source of the installed models, which are part of a job's identity.
    store : Store
    database : sqlalchemy.Engine
    registry : WorkerRegistry
    metrics : Metrics
    limits : StorageLimits

    Attributes
    ----------
    deliveries : Deliveries
        Deliveries of results to other systems.
    trail : AuditTrail
    reviews : Reviews
        Verdicts of readers. They are erased with their job.
    instances : InstanceIndex
        DICOM results of the succeeded jobs.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        database: sa.Engine,
        registry: WorkerRegistry,
        metrics: Metrics,
        limits: StorageLimits,
    ) -> None:
        self._engine = engine
        self._store = store
        self._database = database
        self._registry = registry
        self._metrics = metrics
        self._limits = limits
        self.deliveries = Deliveries(database)
        self.trail = AuditTrail(database)
        self._table = workflow_table(database)
        self._key_hasher = KeyHasher(database)
        self.reviews = Reviews(database)
        self.instances = InstanceIndex(database, WORKFLOW)

    def audit(self, entry: AuditEntry) -> None:
        """Append a row to the audit trail, and count it if that fails. The driver's error is raised."""
        try:
            self.trail.write(entry)
        except Exception:
            self._metrics.audit_failures.inc()
            raise

    # ---- submit ----

    def check_capacity(self, size: int) -> None:
        """Refuse a scan if the queue is full or too little disk space would be left.

        Parameters
        ----------
        size : int
            Size of the upload in bytes, as far as it is known.

        Raises
        ------
        StoreFull
            Too little disk space would be left.
        QueueFull
            The number of waiting jobs has reached the limit.
        """
        self.check_disk(size)
        waiting = len(self.positions())
        if waiting >= self._limits.queue_limit:
            raise errors.QueueFull(
                f"{waiting} scans are waiting.",
                expected=f"fewer than {self._limits.queue_limit} waiting scans.",
                advice="Send the scan again later (see Retry-After), or raise COUNTERPART_QUEUE_LIMIT.",
            )

    def check_disk(self, size: int) -> None:
        """Refuse a scan if too little disk space would be left.

        Raises
        ------
        StoreFull
        """
        self._limits.check_disk(self._store, size)

    def submit(
        self,
        upload: Upload,
        request: AnalysisRequest,
        key: str | None,
        priority: Priority = "routine",
        reference: str | None = None,
    ) -> str:
        """Create a job for an upload, or return the existing job for the same content or key.

        Parameters
        ----------
        upload : Upload
            A complete upload. It is moved into the store if the job is new.
        request : AnalysisRequest
            Model and parameters.
        key : str or None
            The caller's Idempotency-Key. It identifies the job instead of the content.
        priority : {"routine", "stat"}
            Priority of a new job. An existing job keeps its priority.
        reference : str or None
            Random name under which `find_reference` finds a new job in every state.

        Returns
        -------
        str
            Id of the job. The scan and the job are on disk.

        Raises
        ------
        IdempotencyKeyReused
            The key belongs to a job with another content.
        StoreFull, QueueFull
            The job is new, and the capacity was exhausted during the upload.
        """
        content_hash = self._content_hash(upload.digest, request)
        # A key can contain a patient's name, so only its keyed hash is stored.
        identity = content_hash if key is None else self._key_hasher.hash_key(key)
        # Version 0.1.0 hashed keys without a secret.
        identities = (identity,) if key is None else (identity, _sha256("key", key))
        for known in identities:
            job = self._find_reusable(known, content_hash)
            if job is not None:
                return job
        self.check_capacity(0)  # a second time, because other scans may have come during the upload
        job = f"{identity[:16]}-{secrets.token_hex(8)}"
        self._store.commit_upload(upload, job)
        options = EnqueueOptions(
            workflow_name=WORKFLOW,
            queue_name=QUEUE,
            workflow_id=job,
            deduplication_id=identity,
            duplication_policy="return-existing",
            priority=PRIORITIES[priority],
            attributes={"content": content_hash, "model": request.model, "stage": None, "progress": 0.0}
            | ({"reference": reference} if reference else {}),
        )
        # A worker of an older version refuses unknown fields.
        arguments = {name: value for name, value in asdict(request).items() if name != "note" or value}
        queued_job = DBOS.enqueue_workflow_with_options(options, job, arguments).workflow_id
        if queued_job != job:  # the same scan was submitted twice at the same moment
            self._store.erase(job)
            _check_content(self.get(queued_job), content_hash)
        else:
            self._metrics.received.inc()
        return queued_job

    def _content_hash(self, digest: str, request: AnalysisRequest) -> str:
        """Return the hash of everything that determines the results: bytes, parameters, eligible models, settings."""
        models = sorted(m.id for m in self._engine.manifests if request.model in (None, m.name, m.id))
        # A caller who names a model confirms a scan without a modality, and the report states which case it was.
        named = "named" if request.model else "chosen"
        # The default settings add nothing, so jobs of earlier versions are found.
        settings = filter(None, [self._engine.settings_key])
        parameters = (repr(request.series), repr(request.seed), request.geometry)
        return _sha256("content", digest, *models, named, *parameters, *settings)

    def _find_reusable(self, identity: str, content_hash: str) -> str | None:
        found = list_workflows(
            workflow_id_prefix=identity[:16] + "-",
            status=REUSABLE_STATUSES,
            sort_desc=True,
            limit=1,
            load_output=False,
        )
        if not found:
            return None
        job = to_job(found[0])
        _check_content(job, content_hash)
        return job.id

    # ---- find ----

    def get(self, job: str) -> Job:
        """Return a job.

        Raises
        ------
        NotFound
            No job has this id.
        """
        found = list_workflows(workflow_ids=[job]) if JOB_ID.fullmatch(job) else []
        if not found:
            raise errors.NotFound(
                "No job has this id.",
                expected="the id of a job from POST /v1/scans that was not erased.",
                advice="List the jobs with GET /v1/scans, or send the scan again.",
            )
        return to_job(found[0])

    def list_jobs(
        self, job_filter: JobFilter, limit: int, after: Cursor | None, order: Order = "newest"
    ) -> Sequence[Job]:
        """Return a page of jobs. New jobs do not shift the pages that follow.

        Parameters
        ----------
        job_filter : JobFilter
        limit : int
            Largest number of jobs in the page.
        after : Cursor or None
            Last job of the previous page.
        order : {"newest", "oldest"}
            The job that comes first.
        """
        t = self._table.c
        position = sa.tuple_(t.created_at, t.workflow_uuid)
        query = sa.select(t.workflow_uuid).where(t.name == WORKFLOW, *self._conditions(job_filter))
        if after is not None:
            # Many jobs can have the same time, which SQLite stores in seconds. Their ids break the tie.
            last = (_milliseconds(after.created), after.id)
            query = query.where(position < last if order == "newest" else position > last)
        columns = (t.created_at, t.workflow_uuid)
        query = query.order_by(*(column.desc() if order == "newest" else column for column in columns)).limit(limit)
        with self._database.connect() as connection:
            ids = list(connection.execute(query).scalars())
        jobs = self.find(ids)
        return [jobs[job] for job in ids if job in jobs]

    def find(self, jobs: Sequence[str]) -> dict[str, Job]:
        """Return the jobs that exist, by id."""
        return {job.id: job for job in (map(to_job, list_workflows(workflow_ids=list(jobs))) if jobs else ())}

    def find_reference(self, reference: str) -> str | None:
        """Return the job that was created with a reference, in any state, or None if there is none."""
        t = self._table.c
        query = sa.select(t.workflow_uuid).where(t.name == WORKFLOW, t.attributes["reference"].as_string() == reference)
        with self._database.connect() as connection:
            return connection.execute(query).scalars().first()

    def read_states(self, jobs: Collection[str]) -> dict[str, RawState]:
        """Return the states of the jobs that exist, by id: one cheap query, to notice changes."""
        t = self._table.c
        query = sa.select(t.workflow_uuid, t.status, t.attributes).where(t.workflow_uuid.in_(jobs))
        with self._database.connect() as connection:
            return {row[0]: RawState(row[1], row[2]) for row in connection.execute(query)}

    def positions(self) -> dict[str, int]:
        """Return the position of each waiting job in the queue, starting with 1 for the next job."""
        t = self._table.c
        # This is the order in which DBOS dequeues.
        query = sa.select(t.workflow_uuid).where(t.name == WORKFLOW, t.status.in_(QUEUED_STATUSES))
        with self._database.connect() as connection:
            waiting = connection.execute(query.order_by(t.priority, t.created_at)).scalars()
            return {job: position for position, job in enumerate(waiting, start=1)}

    def _conditions(self, job_filter: JobFilter) -> Iterator[sa.ColumnElement[bool]]:
        t = self._table.c
        if job_filter.states:
            yield t.status.in_([name for name, state in STATES.items() if state in job_filter.states])
        if job_filter.priority:
            number = PRIORITIES[job_filter.priority]
            yield t.priority.in_([number, number + 1])
        if job_filter.model:
            model = t.attributes["model"].as_string()
            # A name matches all its versions. A version begins with a digit, so "t1" does not match "t1-flair".
            versions = (model.startswith(f"{job_filter.model}-{digit}", autoescape=True) for digit in range(10))
            yield sa.or_(model == job_filter.model, *versions)
        if job_filter.code:
            yield t.attributes["code"].as_string() == job_filter.code
        if job_filter.created_after:
            yield t.created_at >= _milliseconds(job_filter.created_after)
        if job_filter.created_before:
            yield t.created_at < _milliseconds(job_filter.created_before)

    # ---- cancel and erase ----

    def cancel(self, job: str) -> None:
        """Cancel a job. Cancelling it again is not an error.

        Raises
        ------
        AlreadyFinished
            The job succeeded or failed before.
        NotFound
            No job has this id.
        """
        before = self.get(job).state
        if before != "failed":
            DBOS.cancel_workflow(job)
        state = self.get(job).state
        if state != "cancelled":
            raise errors.AlreadyFinished(
                f"The job has {state}.",
                expected="a job that is queued or running.",
                advice="Use DELETE to erase the job and its results.",
            )
        if before != "cancelled":
            self._metrics.outcomes.labels("cancelled").inc()
            log.info("job cancelled", job=job)
        # The worker does the same if it published in the meantime. `JobService.enforce_retention` repeats it.
        with suppress(errors.StoreUnavailable, OSError):
            self._store.discard_all_but_scan(job)

    def erase(self, job: str) -> None:
        """Erase a job in any state, with its scan, its results and its crash records.

        Raises
        ------
        NotFound
            No job has this id.
        StoreUnavailable
            The store does not answer. If the erasure has begun, the supervisor finishes it.
        """
        self.get(job)
        # The files go first: whatever fails after this line, the store remembers the erasure. A worker that publishes
        # at this moment finds its folder missing and cannot recreate it.
        self._store.begin_erasure(job)
        self.finish_erasure(job)

    def finish_erasure(self, job: str) -> None:
        """Delete the rows of a job whose files are being erased, then what is left of the files.

        Raises
        ------
        StoreUnavailable
        """
        try:
            self._delete_rows(job)
        except SQLAlchemyError:
            # A database on a full disk can write again when the files are gone.
            self._store.clear_erased(job)
            self._delete_rows(job)
        self._store.finish_erasure(job)
        truncate_write_ahead_log(self._database)
        log.info("job erased", job=job)

    def _delete_rows(self, job: str) -> None:
        DBOS.delete_workflow(job)
        self._registry.delete_crash_records(job)
        self.deliveries.erase(job)
        self.reviews.erase(job)
        self.instances.erase(job)

    def is_cancelled(self, job: str) -> bool:
        """Return whether a job was cancelled. DBOS's own call would become a step of the workflow that calls it."""
        t = self._table.c
        with self._database.connect() as connection:
            query = sa.select(t.status).where(t.workflow_uuid == job)
            return connection.execute(query).scalar_one_or_none() == "CANCELLED"

    # ---- observe ----

    def count_workers(self) -> int:
        """Return the number of live workers on all machines."""
        return len(self._registry.heartbeats())

    def metrics(self) -> bytes:
        """Return the Prometheus metrics, with the current state of the queue."""
        waiting = list_workflows(status=QUEUED_STATUSES, load_output=False)
        self._metrics.queued.set(len(waiting))
        ages = [(datetime.now(UTC) - to_job(status).created).total_seconds() for status in waiting]
        self._metrics.oldest.set(max([0.0, *ages]))
        self._metrics.workers.set(self.count_workers())
        self._metrics.running.set(len(list_workflows(status="PENDING", load_output=False)))
        self._metrics.deliveries.clear()
        for (target, state), number in self.deliveries.count().items():
            self._metrics.deliveries.labels(target, state).set(number)
        self._metrics.delivery_age.clear()
        for target, seconds in self.deliveries.ages().items():
            self._metrics.delivery_age.labels(target).set(seconds)
        return self._metrics.text()


def list_workflows(**filters: Any) -> list[WorkflowStatus]:
    """Return the DBOS workflows of the jobs that match all filters of `DBOS.list_workflows`."""
    return DBOS.list_workflows(name=WORKFLOW, load_input=False, **filters)


def to_job(status: WorkflowStatus) -> Job:
    """Convert the status, attributes and outcome of a workflow to a job."""
    attributes = status.attributes or {}
    state = STATES[status.status]
    output = status.output if isinstance(status.output, dict) else {}
    return Job(
        id=status.workflow_id,
        state=state,
        stage=attributes.get("stage") if state == "running" else None,
        progress=1.0 if state == "succeeded" else attributes.get("progress", 0.0),
        model=output.get("model") or attributes.get("model"),
        results=tuple(output.get("results") or FIRST_RESULTS) if state == "succeeded" else (),
        summary=_summary(output.get("summary")),
        is_routed=bool(output.get("is_routed")),
        created=cast("datetime", _time(status.created_at)),
        started=_time(status.dequeued_at),
        ended=_time(status.completed_at),
        problem=_problem(status) if state == "failed" else None,
        content_hash=attributes.get("content", ""),
        priority="stat" if (status.priority or 0) in {2, 3} else "routine",
    )


def _summary(recorded: Mapping[str, Any] | None) -> ResultSummary | None:
    """Return the summary that a version recorded, which may have more fields than this one knows."""
    return ResultSummary(**{f.name: recorded[f.name] for f in fields(ResultSummary)}) if recorded else None


def _problem(status: WorkflowStatus) -> dict[str, str]:
    if isinstance(status.error, PortableWorkflowError) and isinstance(status.error.data, dict):
        return cast("dict[str, str]", status.error.data)
    return errors.InternalError(
        "The job ended without a result.",
        expected="a result, or an error with a reason.",
        advice="Send the scan again. If it fails again, report the id of the job.",
    ).problem


def _check_content(job: Job, content_hash: str) -> None:
    if job.content_hash != content_hash:
        raise errors.IdempotencyKeyReused(
            "The Idempotency-Key was used for another scan, model or parameters.",
            expected="one key for one scan with its parameters.",
            advice="Send a new key, or no key. The same content gives the same job without a key.",
        )


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _time(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def _milliseconds(time: datetime) -> int:
    return round(time.timestamp() * 1000)
