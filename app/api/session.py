"""/session and /login: sessions of browsers, which begin with a token or with a login at the issuer.

The login follows the authorisation code flow with PKCE (OpenID Connect Core section 3.1, RFC 7636).
"""

import base64
import hashlib
import hmac
import secrets
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response, Security
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.security import HTTPAuthorizationCredentials
from pydantic import BaseModel, ConfigDict, Field

from app.api.identity import SESSION_COOKIE as COOKIE
from app.api.identity import (
    Identity,
    Principal,
    bearer,
    check_same_origin,
    get_identity,
    session_cookie,
)
from app.api.json_body import parse_body, read_body
from app.api.problems import problem_responses
from app.api.tokens import SCOPES, Scope
from app.errors import CounterpartError, Forbidden, LoginFailed, NotFound, Unauthorised

router = APIRouter(tags=["session"])

LOGIN_COOKIE = "counterpart_login"
# Seconds to log in at the issuer.
LOGIN_SECONDS = 600.0
MAX_TOKEN_LENGTH = 16_384
MAX_BODY_BYTES = 2 * MAX_TOKEN_LENGTH
CALLBACK_CSP = "default-src 'none'; frame-ancestors 'none'"


class SessionRequest(BaseModel):
    """Body of POST /session."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    token: str = Field(min_length=1, max_length=MAX_TOKEN_LENGTH, description="A token that a program sends as bearer.")


class SessionState(BaseModel):
    """The caller of a request."""

    model_config = ConfigDict(frozen=True)

    actor: str | None = Field(description="Name of the caller; null without a login.")
    scopes: tuple[Scope, ...] = Field(description="What the caller may do.")
    login: Literal["none", "token", "oidc"] = Field(description="Way in which a person logs in.")


@router.get("/session", responses=problem_responses(401, 403, 503))
async def get_session(
    request: Request,
    response: Response,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)],
    cookie: Annotated[str | None, Security(session_cookie)],
) -> SessionState:
    """Show who is logged in. Without a session, `actor` is null. A wrong bearer token is an error."""
    identity = get_identity(request)
    response.headers["Cache-Control"] = "no-store"
    token = credentials.credentials if credentials else None
    try:
        return _describe(identity, await identity.authenticate(request, token, cookie))
    except Unauthorised:
        if token is not None:
            request.state.action = "refuse"
            raise
        return _describe(identity, None)


@router.post(
    "/session",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": SessionRequest.model_json_schema()}},
        }
    },
    responses=problem_responses(400, 401, 403, 408, 413, 503),
)
async def create_session(request: Request, response: Response) -> SessionState:
    """Begin a session with a token, for 12 hours at most. A page sends it with the header X-Counterpart-CSRF: 1.

    The session of a JWT ends when the JWT expires.
    """
    # Anybody can call this route, so the body is read by hand: FastAPI would keep a body of any length in memory.
    body = parse_body(SessionRequest, await read_body(request, MAX_BODY_BYTES))
    identity = get_identity(request)
    check_same_origin(request, identity.settings.public_url)
    request.state.action = "login"
    if identity.login == "none":
        return _describe(identity, await identity.authenticate(request, None, None))
    principal = await identity.check_token(body.token)
    request.state.principal = principal
    response.headers["Cache-Control"] = "no-store"
    await _begin_session(request, response, principal)
    return _describe(identity, principal)


@router.delete("/session", status_code=204, responses=problem_responses(403, 503))
async def delete_session(request: Request, response: Response) -> None:
    """End the session: remove the cookie from the browser."""
    identity = get_identity(request)
    check_same_origin(request, identity.settings.public_url)
    principal = await identity.read_session(request.cookies.get(COOKIE, ""))
    if principal:
        request.state.principal, request.state.action = principal, "logout"
    response.delete_cookie(COOKIE, _cookie_path(request))


@router.get(
    "/login",
    response_class=RedirectResponse,
    status_code=303,
    responses={303: {"description": "Redirect to the login page of the issuer"}, **problem_responses(403, 404, 503)},
)
async def begin_login(request: Request) -> Response:
    """Begin a login at the issuer: redirect the browser to its login page."""
    identity = get_identity(request)
    issuer, client, redirect_uri = _require_login(identity)
    endpoint = await issuer.find_endpoint("authorization_endpoint")
    state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
    query = {
        "response_type": "code",
        "client_id": client,
        "redirect_uri": redirect_uri,
        "scope": identity.settings.oidc_login_scope,
        "state": state,
        "nonce": nonce,
        "code_challenge": challenge,
        "code_challenge_method": "S256",
    }
    response = RedirectResponse(f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(query)}", 303)
    fields = {"state": state, "nonce": nonce, "verifier": verifier}
    cookie = await identity.calls.query(identity.values.sign, "login", fields, LOGIN_SECONDS)
    # The issuer sends the browser back from another site: a strict cookie would be missing.
    _set_cookie(request, response, LOGIN_COOKIE, cookie, LOGIN_SECONDS, "lax")
    response.headers["Cache-Control"] = "no-store"
    return response


@router.get(
    "/login/callback",
    response_class=HTMLResponse,
    responses={200: {"description": "Page that leads to the dashboard"}, **problem_responses(400, 401, 403, 404, 503)},
)
async def finish_login(
    request: Request,
    state: Annotated[str, Query(max_length=200, description="Value of the login that the issuer repeats.")] = "",
    code: Annotated[str, Query(max_length=4096, description="Authorisation code of the issuer.")] = "",
) -> Response:
    """Finish a login at the issuer: exchange the code, check the ID token, and begin a session."""
    identity = get_identity(request)
    request.state.action = "login"
    fields = await identity.calls.query(identity.values.read, "login", request.cookies.get(LOGIN_COOKIE, ""))
    if not fields or not hmac.compare_digest(fields["state"].encode(), state.encode()):
        raise _login_failed("The login did not begin in this browser, or it took longer than ten minutes.")
    if not code:
        raise _login_failed("The issuer refused the login.")
    principal = await _exchange(identity, code, fields)
    request.state.principal = principal
    if not principal.scopes:
        raise Forbidden(
            "The login succeeded, but the account has no scope.",
            expected=f"one of {', '.join(SCOPES)} (COUNTERPART_OIDC_SCOPE_CLAIM, COUNTERPART_OIDC_SCOPES).",
            advice="Ask the operator for a role that gives a scope.",
        )
    response = _lead_to_dashboard(request)
    await _begin_session(request, response, principal)
    response.delete_cookie(LOGIN_COOKIE, _cookie_path(request))
    return response


async def _exchange(identity: Identity, code: str, fields: dict[str, Any]) -> Principal:
    """Return the principal of an authorisation code."""
    issuer, client, redirect_uri = _require_login(identity)
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": redirect_uri,
        "client_id": client,
        "code_verifier": fields["verifier"],
    }
    secret = identity.settings.oidc_client_secret
    if secret is not None:
        form["client_secret"] = secret.get_secret_value()
    try:
        answer = await issuer.exchange_code(form, {"Accept": "application/json"})
        claims = await issuer.verify(str(answer.get("id_token", "")), client)
    except Unauthorised as error:
        raise _login_failed(error.found) from None
    if not hmac.compare_digest(str(claims.get("nonce", "")).encode(), fields["nonce"].encode()):
        raise _login_failed("The ID token belongs to another login.")
    scopes = issuer.find_scopes(claims) or await _scopes_of_access_token(identity, answer, claims["sub"])
    return await identity.subject(claims["sub"], scopes)


async def _scopes_of_access_token(identity: Identity, answer: dict[str, Any], subject: str) -> frozenset[Scope]:
    """Return the scopes of the access token, if it is a JWT for this service and for the same subject."""
    assert identity.issuer is not None
    try:
        claims = await identity.issuer.verify(str(answer.get("access_token", "")))
    except Unauthorised:
        return frozenset()
    return identity.issuer.find_scopes(claims) if claims["sub"] == subject else frozenset()


def _require_login(identity: Identity) -> tuple[Any, str, str]:
    """Return the issuer, the client id and the redirect URI, which never depends on the request."""
    client, public_url = identity.settings.oidc_client, identity.settings.public_url
    if identity.issuer is None or not client or not public_url:
        raise NotFound(
            "The login by OIDC is not set up.",
            expected="COUNTERPART_OIDC_ISSUER, COUNTERPART_OIDC_CLIENT and COUNTERPART_PUBLIC_URL.",
            advice="Log in with a token: POST /session.",
        )
    return identity.issuer, client, f"{public_url.rstrip('/')}/login/callback"


def _lead_to_dashboard(request: Request) -> Response:
    """Return a page that opens the dashboard.

    After a redirect, the browser would count the next request as one of the issuer's site, and leave out the cookie.
    """
    target = f"{request.scope.get('root_path', '')}/"
    page = f'<!doctype html><title>Counterpart</title><meta http-equiv="refresh" content="0;url={target}">'
    headers = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "Content-Security-Policy": CALLBACK_CSP}
    return HTMLResponse(page, headers=headers)


async def _begin_session(request: Request, response: Response, principal: Principal) -> None:
    seconds = principal.session_seconds
    cookie = await get_identity(request).create_session(principal, seconds)
    _set_cookie(request, response, COOKIE, cookie, seconds, "strict")


def _set_cookie(
    request: Request, response: Response, name: str, value: str, seconds: float, same_site: Literal["strict", "lax"]
) -> None:
    public_url = get_identity(request).settings.public_url or ""
    response.set_cookie(
        name,
        value,
        max_age=int(seconds),
        path=_cookie_path(request),
        secure=request.url.scheme == "https" or public_url.startswith("https:"),
        httponly=True,
        samesite=same_site,
    )


def _cookie_path(request: Request) -> str:
    return request.scope.get("root_path") or "/"


def _describe(identity: Identity, principal: Principal | None) -> SessionState:
    scopes = tuple(sorted(principal.scopes, key=SCOPES.index)) if principal else ()
    return SessionState(actor=principal.actor if principal else None, scopes=scopes, login=identity.login)


def _login_failed(found: str) -> CounterpartError:
    return LoginFailed(
        found,
        expected="a login that begins with GET /login and ends within ten minutes.",
        advice="Log in again.",
    )
