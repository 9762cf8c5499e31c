"""Audit trail: who did what with which job, when, from where, and with which outcome. And /v1/audit, the export.

The rows contain no patient data, no file names and no query strings. Triggers of the database refuse to change a row,
and to delete one that is younger than `MIN_AUDIT_DAYS`. Erasing a scan keeps its rows.

A route names its action with `app.api.identity.require`. The row of a reading action is committed before the first
byte of the response. A changing action has two rows: `begun` before the route runs, and its outcome after it. If a
row cannot be written in time, the caller gets 503: decision 24.
"""

import json
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Annotated

import sqlalchemy as sa
import structlog
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.dependencies import ServicesDependency, ThreadGroup
from app.api.identity import Action, Auditor, require
from app.api.problems import problem_of, problem_response, problem_responses
from app.errors import AuditUnavailable, error_location
from app.jobs.queue import JOB_ID
from app.settings import MIN_AUDIT_DAYS

router = APIRouter(tags=["operation"])

# Outcome of the row before an action that changes something.
BEGUN = "begun"
PAGE_ROWS = 1000
# Writers on PostgreSQL take turns, so that a reader who continues after an id misses no row that commits later.
ADVISORY_LOCK = 0x436F756E746572
DAY_MILLISECONDS = 86_400_000

# Seconds until a row must be committed.
WRITE_SECONDS = 5.0
# Polls and parts of a download repeat: the same row is written once in this time, in seconds.
REPEAT_SECONDS = 60.0
REPEATED_ACTIONS = frozenset({"list", "show", "follow", "download", "refuse"})
MAX_REMEMBERED = 10_000
UNKNOWN_ACTOR = "unknown"

log = structlog.get_logger("counterpart.audit")


# ---- trail -------------------------------------------------------------------------------------

metadata = sa.MetaData()
table = sa.Table(
    "counterpart_audit",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("time", sa.BigInteger, nullable=False),  # milliseconds since the epoch
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("job", sa.Text),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("address", sa.Text),
    sqlite_autoincrement=True,  # an id is never used twice
)

SQLITE_TRIGGERS = (
    """CREATE TRIGGER IF NOT EXISTS counterpart_audit_update BEFORE UPDATE ON counterpart_audit
    BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END""",
    f"""CREATE TRIGGER IF NOT EXISTS counterpart_audit_delete BEFORE DELETE ON counterpart_audit
    WHEN OLD.time > (CAST(strftime('%s', 'now') AS INTEGER) - {MIN_AUDIT_DAYS * 86_400}) * 1000
    BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END""",
)
POSTGRESQL_TRIGGERS = (
    f"""CREATE OR REPLACE FUNCTION counterpart_audit_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF TG_OP = 'DELETE' THEN
        IF OLD.time <= (extract(epoch FROM now()) - {MIN_AUDIT_DAYS * 86_400}) * 1000 THEN RETURN OLD; END IF;
    END IF;
    RAISE EXCEPTION 'the audit trail is append-only'; END $$""",
    "DROP TRIGGER IF EXISTS counterpart_audit_row ON counterpart_audit",
    """CREATE TRIGGER counterpart_audit_row BEFORE UPDATE OR DELETE ON counterpart_audit
    FOR EACH ROW EXECUTE FUNCTION counterpart_audit_refuse()""",
    "DROP TRIGGER IF EXISTS counterpart_audit_all ON counterpart_audit",
    """CREATE TRIGGER counterpart_audit_all BEFORE TRUNCATE ON counterpart_audit
    FOR EACH STATEMENT EXECUTE FUNCTION counterpart_audit_refuse()""",
)


@dataclass(frozen=True)
class AuditEntry:
    """An event.

    Attributes
    ----------
    actor : str
        `app.api.identity.Principal.actor`, or "unknown".
    action : str
    outcome : str
        Status of the response, or "begun".
    job : str or None
    address : str or None
        Address of the client.
    """

    actor: str
    action: Action
    outcome: str
    job: str | None = None
    address: str | None = None


@dataclass(frozen=True)
class AuditRow(AuditEntry):
    """A row of the trail, with its number and its time in UTC."""

    id: int = 0
    time: str = ""

    def to_line(self) -> str:
        """Return the row as a line of JSON."""
        fields = asdict(self)
        return json.dumps({column.name: fields[column.name] for column in table.columns}) + "\n"


class AuditTrail:
    """The table of events. Every method blocks.

    Parameters
    ----------
    database : sqlalchemy.Engine
    """

    def __init__(self, database: sa.Engine) -> None:
        self._database = database

    def create_tables(self) -> None:
        """Create the table and its triggers if they do not exist. Several processes may do this at once."""
        triggers = POSTGRESQL_TRIGGERS if self._database.dialect.name == "postgresql" else SQLITE_TRIGGERS
        with self._database.begin() as connection:
            self._take_turn(connection)
            connection.execute(sa.schema.CreateTable(table, if_not_exists=True))
            for statement in triggers:
                connection.exec_driver_sql(statement)

    def write(self, entry: AuditEntry) -> None:
        """Append a row. When this returns, the row is committed."""
        values = asdict(entry) | {"time": round(time.time() * 1000)}
        with self._database.begin() as connection:
            self._take_turn(connection)
            connection.execute(table.insert().values(values))

    def read(self, after: int = 0, limit: int = PAGE_ROWS) -> list[AuditRow]:
        """Return the rows with a larger id than `after`, in order."""
        query = sa.select(table).where(table.c.id > after).order_by(table.c.id).limit(limit)
        with self._database.connect() as connection:
            return [_to_row(row) for row in connection.execute(query)]

    def read_all(self, after: int = 0) -> Iterator[AuditRow]:
        """Yield all rows with a larger id than `after`, one page at a time."""
        while page := self.read(after):
            yield from page
            after = page[-1].id

    def delete_expired(self, keep_days: float) -> int:
        """Delete rows that are older than this and than `MIN_AUDIT_DAYS`, and return their number. 0 keeps all."""
        if not keep_days:
            return 0
        # An hour more than the triggers require, because the clock of the database may differ.
        age = max(keep_days, MIN_AUDIT_DAYS) * DAY_MILLISECONDS + 3_600_000
        with self._database.begin() as connection:
            return connection.execute(table.delete().where(table.c.time < time.time() * 1000 - age)).rowcount

    def _take_turn(self, connection: sa.Connection) -> None:
        if self._database.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))


def is_disk_full(error: BaseException) -> bool:
    """Return whether a database error means that the disk is full."""
    cause = getattr(error, "orig", None)
    if isinstance(cause, sqlite3.OperationalError):
        return cause.sqlite_errorcode == sqlite3.SQLITE_FULL
    return getattr(cause, "sqlstate", None) == "53100"


def _to_row(row: sa.Row[tuple[object, ...]]) -> AuditRow:
    fields = dict(row._mapping)
    moment = datetime.fromtimestamp(fields.pop("time") / 1000, UTC)
    return AuditRow(**fields, time=moment.isoformat(timespec="milliseconds"))


# ---- requests ----------------------------------------------------------------------------------


class _DiskFull(AuditUnavailable):
    """The row does not fit on the disk."""


class RequestAuditor(Auditor):
    """Writer of rows with a deadline.

    Parameters
    ----------
    trail : AuditTrail
    """

    def __init__(self, trail: AuditTrail) -> None:
        self.trail = trail
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
            # A caller without a credential can name any job: it must not fill the trail with rows.
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
                    # The caller learns nothing of a success that has no row. A failure shows nothing of a scan.
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
