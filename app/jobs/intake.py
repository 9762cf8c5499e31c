"""Taking a scan in: is there room, is there such a job already, and else a new one."""

import hashlib
import secrets
from dataclasses import asdict

import sqlalchemy as sa
from dbos import DBOS, EnqueueOptions

from app import errors
from app.analysis import AnalysisRequest
from app.jobs.engine import Engine
from app.jobs.incoming import Incoming
from app.jobs.job import Job, Priority
from app.jobs.listing import WORKFLOW, Listing
from app.jobs.records import ANSWERING, PRIORITIES
from app.jobs.retention import Limits
from app.jobs.store import Store

QUEUE = "scans"


class Intake(Listing):
    """What becomes of an upload; every method blocks, and none may run on an event loop.

    Parameters
    ----------
    engine : Engine
    store : Store
    database : sqlalchemy.Engine
    limits : Limits
    """

    def __init__(self, engine: Engine, store: Store, database: sa.Engine, limits: Limits) -> None:
        super().__init__(database)
        self._engine = engine
        self._store = store
        self._limits = limits

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

    def submit(self, incoming: Incoming, request: AnalysisRequest, key: str | None, priority: Priority = "routine") -> str:
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
        StoreFull, QueueFull
            The job is new, and there is no room for it any more.
        """
        content = self._content(incoming.digest, request)
        # The key itself may name a patient: only its hash is kept.
        identity = content if key is None else _sha256("key", key)
        job = self._answering(identity, content)
        if job is not None:
            return job
        self.check_room(0)  # again: others may have come while this one was received
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

    # ---- inside ----

    def _content(self, digest: str, request: AnalysisRequest) -> str:
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


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
