"""Identity of callers: who calls, and which scopes the call may use.

Every route has `require(scope)` as a dependency. A caller proves its identity with a bearer token (the token of the
settings, a named token, or a JWT of the issuer) or with the cookie of a session that began with one.

Each request gets its row in the audit trail before its response leaves, or it is refused. A route names its action with
`require`. The row of a reading action is committed before the first byte of the response. A changing action has two
rows: `begun` before the route runs, and its outcome after it. If a row cannot be written in time, the caller gets 503:
decision 24.
"""

import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast
from urllib.parse import urlsplit

import structlog
from fastapi import Request, Security
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as ASGIScope

from app.api.cookies import SignedValues
from app.api.dependencies import Calls, ThreadGroup
from app.api.problems import problem_of, problem_response
from app.api.tokens import SCOPES, Scope, TokenFile, hash_token
from app.errors import AuditUnavailable, Forbidden, ForeignOrigin, Unauthorised, error_location
from app.jobs.audit import BEGUN, Action, AuditEntry, AuditTrail, is_disk_full
from app.jobs.metrics import Metrics
from app.jobs.queue import JOB_ID
from app.settings import Settings

if TYPE_CHECKING:
    from app.api.oidc import Issuer

Source = Literal["none", "token", "named", "oidc"]
SESSION_COOKIE = "counterpart_session"
SESSION_SECONDS = 12 * 3600.0
CSRF_HEADER = "X-Counterpart-CSRF"
# Actions that also have a row before they run.
CHANGING_ACTIONS: frozenset[Action] = frozenset({"send", "review", "cancel", "erase", "retry"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
ALL_SCOPES: frozenset[Scope] = frozenset(SCOPES)
# Seconds until a row must be committed.
WRITE_SECONDS = 5.0
# Polls and parts of a download repeat. In this time, in seconds, the same row is written once.
REPEAT_SECONDS = 60.0
REPEATED_ACTIONS = frozenset({"list", "show", "follow", "download", "refuse"})
MAX_REMEMBERED = 10_000
UNKNOWN_ACTOR = "unknown"

log = structlog.get_logger("counterpart.audit")

bearer = HTTPBearer(
    auto_error=False, scheme_name="bearer", description="COUNTERPART_TOKEN, a named token, or a JWT of the issuer."
)
session_cookie = APIKeyCookie(
    name=SESSION_COOKIE,
    auto_error=False,
    scheme_name="session",
    description=f"Cookie of POST /session or GET /login. Unsafe methods also need the header {CSRF_HEADER}: 1.",
)


@dataclass(frozen=True)
class Principal:
    """A caller.

    Attributes
    ----------
    actor : str
        Name in the audit trail: `anonymous`, `token`, `token:NAME`, or `oidc:SUBJECT`.
    scopes : frozenset of str
    source : {"none", "token", "named", "oidc"}
    pseudonym : str
        Name in logs. The subject of a JWT, which may name a person, is hashed.
    key : str
        Fingerprint of the credential, which a session keeps.
    expires : float, optional
        Time in seconds since 1970 at which the JWT of the caller expires. A session does not outlast it.
    """

    actor: str
    scopes: frozenset[Scope]
    source: Source
    pseudonym: str
    key: str = ""
    expires: float | None = None

    @property
    def session_seconds(self) -> float:
        """Duration of a session that begins now."""
        if self.expires is None:
            return SESSION_SECONDS
        return min(SESSION_SECONDS, max(0.0, self.expires - time.time()))


ANONYMOUS = Principal("anonymous", ALL_SCOPES, "none", "anonymous")


class Identity:
    """The sources of identity that the settings name.

    Parameters
    ----------
    settings : Settings
    calls : Calls
    values : SignedValues
        Signs the sessions.

    Raises
    ------
    InvalidSettings
        The settings of the issuer are incomplete.
    IdentityUnavailable
        The file of tokens is malformed.
    """

    def __init__(self, settings: Settings, calls: Calls, values: SignedValues) -> None:
        self.settings = settings
        self.calls = calls
        self.values = values
        self.issuer = _create_issuer(settings)
        self.tokens = TokenFile(settings.tokens) if settings.tokens else None
        if self.tokens:
            self.tokens.read()

    @property
    def login(self) -> Literal["none", "token", "oidc"]:
        """Way in which a person logs in: none, with a token, or at the issuer."""
        if not self.settings.has_access_control:
            return "none"
        return "oidc" if self.issuer and self.settings.oidc_client else "token"

    async def authenticate(self, request: Request, token: str | None, cookie: str | None) -> Principal:
        """Return the caller of a request. A bearer token takes precedence over a cookie.

        Raises
        ------
        Unauthorised
            There is no valid credential.
        ForeignOrigin
            The cookie came with a request that another site may have caused.
        IdentityUnavailable, DatabaseUnavailable
            The credential cannot be checked.
        """
        if not self.settings.has_access_control:
            return ANONYMOUS
        if token is not None:
            return await self.check_token(token)
        principal = await self.read_session(cookie) if cookie else None
        if principal is None:
            raise _unauthorised()
        if request.method not in SAFE_METHODS:
            check_same_origin(request, self.settings.public_url)
        return principal

    async def check_token(self, token: str) -> Principal:
        """Return the owner of a bearer token.

        Raises
        ------
        Unauthorised, IdentityUnavailable
        """
        static = self.settings.token
        if static is not None and secrets.compare_digest(token.encode(), static.get_secret_value().encode()):
            return _static_principal(token)
        if self.tokens is not None and (named := self.tokens.find(token)):
            return Principal(f"token:{named.name}", named.scopes, "named", f"token:{named.name}", named.sha256)
        if self.issuer is not None and token.count(".") == 2:
            claims = await self.issuer.verify(token)
            principal = await self.subject(claims["sub"], self.issuer.find_scopes(claims))
            return replace(principal, expires=float(claims["exp"]))
        raise _unauthorised()

    async def subject(self, subject: str, scopes: frozenset[Scope]) -> Principal:
        """Return the principal of a subject of the issuer.

        Raises
        ------
        DatabaseUnavailable
            The secret for the pseudonym cannot be read.
        """
        assert self.issuer is not None
        pseudonym = await self.calls.query(self.values.hash, "actor", subject)
        return Principal(f"oidc:{subject}", scopes, "oidc", f"oidc:{pseudonym}", self.issuer.settings.issuer)

    async def create_session(self, principal: Principal, seconds: float) -> str:
        """Return the cookie of a new session."""
        return await self.calls.query(self._sign_session, principal, seconds)

    async def read_session(self, cookie: str) -> Principal | None:
        """Return the owner of a session, None if it has ended: expired, or its token is revoked or changed."""
        fields = await self.calls.query(self.values.read, "session", cookie)
        if fields is None:
            return None
        principal = await self._current_principal(fields)
        return principal if principal and fields["key"] == self._fingerprint(principal) else None

    async def _current_principal(self, fields: dict[str, Any]) -> Principal | None:
        """Return the owner of a session with the rights that the settings and the file of tokens give now."""
        if fields["source"] == "token" and self.settings.token:
            return _static_principal(self.settings.token.get_secret_value())
        if fields["source"] == "named" and self.tokens:
            named = next((t for t in self.tokens.read() if f"token:{t.name}" == fields["actor"]), None)
            if named and named.revoked is None:
                return Principal(fields["actor"], named.scopes, "named", fields["actor"], named.sha256)
        if fields["source"] == "oidc" and self.issuer:
            scopes = cast("frozenset[Scope]", frozenset(fields["scopes"].split()))
            return await self.subject(fields["actor"].removeprefix("oidc:"), scopes)
        return None

    def _sign_session(self, principal: Principal, seconds: float) -> str:
        fields = {"source": principal.source, "actor": principal.actor, "key": self._fingerprint(principal)}
        if principal.source == "oidc":
            fields["scopes"] = " ".join(principal.scopes)
        return self.values.sign("session", fields, seconds)

    def _fingerprint(self, principal: Principal) -> str:
        return self.values.hash("credential", principal.key)


def _create_issuer(settings: Settings) -> "Issuer | None":
    """Create the issuer that the settings name."""
    if settings.oidc_issuer is None:
        return None
    from app.api.oidc import Issuer, read_oidc_settings

    oidc = read_oidc_settings(settings)
    return Issuer(oidc) if oidc else None


def require(scope: Scope, action: Action | None = None) -> Callable[..., Awaitable[Principal]]:
    """Return the dependency that admits only callers with a scope.

    The dependency raises `Unauthorised` without a valid credential, and `Forbidden` without the scope.

    Parameters
    ----------
    scope : str
    action : str, optional
        Name of the call in the audit trail. A call that reads or changes nothing of a scan has none.
    """

    async def check_scope(
        request: Request,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer, scopes=[scope])],
        cookie: Annotated[str | None, Security(session_cookie, scopes=[scope])],
    ) -> Principal:
        identity = get_identity(request)
        token = credentials.credentials if credentials else None
        if token or cookie:
            request.state.action = "refuse"  # unless the credential is valid
        principal = await identity.authenticate(request, token, cookie)
        request.state.principal = principal
        request.state.action = action
        if scope not in principal.scopes:
            raise Forbidden(
                f"The caller does not have the scope `{scope}`.",
                expected=f"a token with the scope `{scope}`.",
                advice="Use another token, or ask the operator for the scope.",
            )
        if action in CHANGING_ACTIONS:
            auditor: RequestAuditor = request.app.state.auditor
            await auditor.begin(request.scope)
        return principal

    check_scope.scope, check_scope.action = scope, action  # type: ignore[attr-defined]  # for the tests of all routes
    return check_scope


def get_identity(request: Request) -> Identity:
    """Return the identity service of the application that received a request."""
    return cast("Identity", request.app.state.identity)


def check_same_origin(request: Request, public_url: str | None) -> None:
    """Refuse a request with a cookie that another site may have caused.

    A page of another site can send neither the header nor the same `Sec-Fetch-Site`.

    Raises
    ------
    ForeignOrigin
    """
    headers = request.headers
    site, origin = headers.get("sec-fetch-site", "same-origin"), headers.get("origin")
    own = {headers.get("host", "").lower(), urlsplit(public_url or "").netloc.lower()} - {""}
    is_own = origin is None or origin.partition("://")[2].lower() in own
    if headers.get(CSRF_HEADER) == "1" and site == "same-origin" and is_own:
        return
    raise ForeignOrigin(
        f"A request with the cookie of a session came from another site, or without the header {CSRF_HEADER}.",
        expected=f"a request of the service's own pages, with {CSRF_HEADER}: 1.",
        advice="Programs use a bearer token instead of the cookie.",
    )


def _static_principal(token: str) -> Principal:
    return Principal("token", ALL_SCOPES, "token", "token", hash_token(token))


def _unauthorised() -> Unauthorised:
    return Unauthorised(
        "The request has no token, or a wrong token.",
        expected="Authorization: Bearer <token>.",
        advice="Ask the operator for a token: COUNTERPART_TOKEN, or one of `counterpart token create`.",
    )


# ---- audit of each request ---------------------------------------------------------------------


class _DiskFull(AuditUnavailable):
    """The row does not fit on the disk."""


class RequestAuditor:
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

    async def begin(self, scope: ASGIScope) -> None:
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

    async def finish(self, scope: ASGIScope, status: int) -> None:
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

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
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


def _describe(scope: ASGIScope, outcome: str) -> AuditEntry:
    principal = scope["state"].get("principal")
    actor = principal.actor if principal else UNKNOWN_ACTOR
    return AuditEntry(actor, scope["state"]["action"], outcome, find_job(scope), client_address(scope))


def find_job(scope: ASGIScope) -> str | None:
    """Return the job of a request: the one that its route created, or that its path names."""
    job = scope.get("state", {}).get("job") or scope.get("path_params", {}).get("job", "")
    return job if JOB_ID.fullmatch(job) else None


def client_address(scope: ASGIScope) -> str | None:
    """Return the address of the client. Behind a proxy, uvicorn has set it (COUNTERPART_TRUSTED_PROXIES)."""
    client = scope.get("client")
    return str(client[0]) if client else None
