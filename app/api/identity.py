"""Identity of callers: who calls, and which scopes the call may use.

Every route has `require(scope)` as a dependency. A caller proves its identity with a bearer token (the token of the
settings, a named token, or a JWT of the issuer) or with the cookie of a session that began with one.
"""

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, cast
from urllib.parse import urlsplit

from fastapi import Request, Security
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import Scope as ASGIScope

from app.api.cookies import SignedValues
from app.api.dependencies import Calls
from app.api.oidc import Issuer, read_oidc_settings
from app.api.tokens import SCOPES, Scope, TokenFile, hash_token
from app.errors import Forbidden, ForeignOrigin, Unauthorised
from app.jobs.audit import Action
from app.settings import Settings

Source = Literal["none", "token", "named", "oidc"]
SESSION_COOKIE = "counterpart_session"
SESSION_SECONDS = 12 * 3600.0
CSRF_HEADER = "X-Counterpart-CSRF"
# Actions that also have a row before they run.
CHANGING_ACTIONS: frozenset[Action] = frozenset({"send", "review", "cancel", "erase", "retry"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
ALL_SCOPES: frozenset[Scope] = frozenset(SCOPES)

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
    """

    actor: str
    scopes: frozenset[Scope]
    source: Source
    pseudonym: str
    key: str = ""


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
        oidc = read_oidc_settings(settings)
        self.issuer = Issuer(oidc) if oidc else None
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
            return await self.subject(claims["sub"], self.issuer.find_scopes(claims))
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

    async def create_session(self, principal: Principal, seconds: float = SESSION_SECONDS) -> str:
        """Return the cookie of a new session."""
        return await self.calls.query(self._sign_session, principal, min(seconds, SESSION_SECONDS))

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


class Auditor(Protocol):
    """Writer of the audit trail."""

    async def begin(self, scope: ASGIScope) -> None:
        """Write the row before an action that changes something, or raise `AuditUnavailable`."""


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
            auditor: Auditor = request.app.state.auditor
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
