"""Audit of requests, and /v1/audit, the export of the trail.

Each request gets its row before its response leaves, or it is refused. A route names its action with
`app.api.identity.require`. The row of a reading action is committed before the first byte of the response. A changing
action has two rows: `begun` before the route runs, and its outcome after it. If a row cannot be written in time, the
caller gets 503: decision 24.
"""

import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.dependencies import ServicesDependency, ThreadGroup
from app.api.identity import Auditor, require
from app.api.problems import problem_of, problem_response, problem_responses
from app.errors import AuditUnavailable, error_location
from app.jobs.audit import BEGUN, PAGE_ROWS, AuditEntry, AuditTrail, is_disk_full
from app.jobs.metrics import Metrics
from app.jobs.queue import JOB_ID

router = APIRouter(tags=["operation"])

# Seconds until a row must be committed.
WRITE_SECONDS = 5.0
# Polls and parts of a download repeat. In this time, in seconds, the same row is written once.
REPEAT_SECONDS = 60.0
REPEATED_ACTIONS = frozenset({"list", "show", "follow", "download", "refuse"})
MAX_REMEMBERED = 10_000
UNKNOWN_ACTOR = "unknown"

log = structlog.get_logger("counterpart.audit")


class _DiskFull(AuditUnavailable):
    """The row does not fit on the disk."""


class RequestAuditor(Auditor):
    """Writer of rows with a deadline.

    Parameters
    ----------
    trail : AuditTrail
    metrics : Metrics
    """

    def __init__(self, trail: AuditTrail, metrics: Metrics) -> None:
        self.trail = trail
        self._metrics = metrics
        self._threads = ThreadGroup("audit", 8, WRITE_SECONDS)
        self._written: dict[tuple[AuditEntry, str], float] = {}

    async def begin(self, scope: Scope) -> None:
        """Write the row before an action that changes something.

        Raises
        ------
        AuditUnavailable
        """
        try:
            await self._write(_describe(scope, BEGUN))
        except _DiskFull:
            # The erasure of a scan may free the space that the row needs. The row of its outcome is still required.
            return
        except AuditUnavailable:
            scope["state"]["action"] = None  # the action has not begun
            raise

    async def finish(self, scope: Scope, status: int) -> None:
        """Write the row of a response, unless it repeats one of the last minute. Each of its jobs has a row.

        Raises
        ------
        AuditUnavailable
        """
        action = scope["state"].get("action")
        if action is None or (action == "refuse" and status != 401):
            return
        if status == 503 and action in REPEATED_ACTIONS:
            return
        phase = scope["state"].get("phase", "")
        for job in scope["state"].get("jobs") or [find_job(scope)]:
            entry = replace(_describe(scope, str(status)), job=job)
            # A caller without a credential can name any job. Such calls must not fill the trail with rows.
            kind = replace(entry, job=None) if action == "refuse" else entry
            if action in REPEATED_ACTIONS and self._is_repeated(kind, phase):
                continue
            await self._write(entry)
            if action in REPEATED_ACTIONS:
                self._remember(kind, phase)

    async def _write(self, entry: AuditEntry) -> None:
        try:
            await self._threads.run(self.trail.write, entry)
        except Exception as error:  # noqa: BLE001  # any class of the driver, or the deadline
            self._metrics.audit_failures.inc()
            log.warning("audit row not written", job=entry.job, **error_location(error))
            fault = _DiskFull if entry.action == "erase" and is_disk_full(error) else AuditUnavailable
            raise fault(
                "The audit trail cannot be written.",
                expected=f"a job database that stores a row within {WRITE_SECONDS:g} s.",
                advice="Try again later (see Retry-After). The operator must check the database and its disk.",
            ) from None

    def _is_repeated(self, entry: AuditEntry, phase: str) -> bool:
        return time.monotonic() - self._written.get((entry, phase), -REPEAT_SECONDS) < REPEAT_SECONDS

    def _remember(self, entry: AuditEntry, phase: str) -> None:
        now = time.monotonic()
        if len(self._written) >= MAX_REMEMBERED:
            self._written = {key: then for key, then in self._written.items() if now - then < REPEAT_SECONDS}
        if len(self._written) < MAX_REMEMBERED:
            self._written[entry, phase] = now


class AuditMiddleware:
    """Middleware that holds back a response until its row is committed.

    Parameters
    ----------
    app : ASGIApp
    auditor : RequestAuditor
    """

    def __init__(self, app: ASGIApp, auditor: RequestAuditor) -> None:
        self._app = app
        self._auditor = auditor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        refused = started = False

        async def send_audited(message: Message) -> None:
            nonlocal refused, started
            if message["type"] == "http.response.start":
                started = True
                try:
                    await self._auditor.finish(scope, message["status"])
                except AuditUnavailable as error:
                    # A success without a row is not sent. A failure contains nothing of a scan.
                    if message["status"] < 400:
                        refused = True
                        await problem_response(problem_of(error))(scope, receive, send)
                        raise
            await send(message)

        try:
            await self._app(scope, receive, send_audited)
        except Exception:
            if refused:
                return
            if not started:
                with suppress(AuditUnavailable):
                    await self._auditor.finish(scope, 500)
            raise


def _describe(scope: Scope, outcome: str) -> AuditEntry:
    principal = scope["state"].get("principal")
    actor = principal.actor if principal else UNKNOWN_ACTOR
    return AuditEntry(actor, scope["state"]["action"], outcome, find_job(scope), client_address(scope))


def find_job(scope: Scope) -> str | None:
    """Return the job of a request: the one that its route created, or that its path names."""
    job = scope.get("state", {}).get("job") or scope.get("path_params", {}).get("job", "")
    return job if JOB_ID.fullmatch(job) else None


def client_address(scope: Scope) -> str | None:
    """Return the address of the client. Behind a proxy, uvicorn has set it (COUNTERPART_TRUSTED_PROXIES)."""
    client = scope.get("client")
    return str(client[0]) if client else None


@router.get(
    "/v1/audit",
    dependencies=[Depends(require("admin", "export"))],
    response_class=StreamingResponse,
    responses={
        200: {"description": "One JSON object a line, in order of `id`", "content": {"application/jsonl": {}}},
        **problem_responses(400, 401, 403, 503),
    },
)
async def export_audit(
    request: Request,
    services: ServicesDependency,
    after: Annotated[int, Query(ge=0, lt=2**63, description="Only rows with a larger `id`.")] = 0,
) -> StreamingResponse:
    """Export the audit trail as JSON lines. To continue later, send the `id` of the last line as `after`."""
    trail: AuditTrail = request.app.state.auditor.trail
    first = await services.calls.query(trail.read, after)

    async def lines() -> AsyncIterator[str]:
        page = first
        while page:
            yield "".join(row.to_line() for row in page)
            # A short page is the end at this moment: the row of this export belongs to the next one.
            is_last = len(page) < PAGE_ROWS
            page = [] if is_last else await services.calls.query(trail.read, page[-1].id)

    return StreamingResponse(lines(), media_type="application/jsonl", headers={"Cache-Control": "no-store"})
