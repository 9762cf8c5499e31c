"""Verification of JSON Web Tokens of one OpenID Connect issuer: its discovery document, its keys, and its claims.

The keys are cached. A token with an unknown key leads to one new request for the keys, at most every 30 s. If the
issuer does not answer, known keys stay valid for a day, and a token with another key gets 503.
"""

import asyncio
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from urllib.parse import urlencode

import jwt
import structlog
from jwt import PyJWK, PyJWKSet

from app.api.dependencies import ThreadGroup
from app.api.tokens import SCOPES, Scope
from app.errors import IdentityUnavailable, InvalidSettings, Unauthorised, error_location
from app.settings import PREFIX, Settings, check_web_address

# Asymmetric algorithms only: with HS256, a public key would be a secret that everybody knows.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
# Seconds by which the clocks of issuer and service may differ.
LEEWAY_SECONDS = 60
# Seconds for one answer of the issuer, and bytes of it.
ISSUER_SECONDS = 5.0
MAX_ANSWER_BYTES = 1 << 20
# Seconds between two requests for the keys, at least.
REFRESH_PAUSE_SECONDS = 30.0
# Seconds after which keys are fetched again, and after which they are no longer used.
FRESH_SECONDS = 600.0
KEEP_SECONDS = 86_400.0
MAX_SUBJECT_LENGTH = 255

# Errors of `Issuer.fetch_keys`.
KEY_ERRORS = (jwt.PyJWTError, IdentityUnavailable, OSError, ValueError)

T = TypeVar("T")

log = structlog.get_logger("counterpart.identity")


@dataclass(frozen=True)
class OidcSettings:
    """Settings of the issuer, checked for completeness."""

    issuer: str
    audience: str
    jwks: str | None
    scope_claim: str
    mapping: Mapping[str, frozenset[Scope]]


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Handler that follows no redirect: an answer comes from the configured host or not at all."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Refuse every redirect; urllib then raises the status as an error."""


def read_oidc_settings(settings: Settings) -> OidcSettings | None:
    """Return the settings of the issuer, None if there is none.

    Raises
    ------
    InvalidSettings
        An audience is missing, or the mapping of scopes is malformed.
    """
    if settings.oidc_issuer is None:
        return None
    if not settings.oidc_audience:
        raise InvalidSettings(
            f"{PREFIX}OIDC_ISSUER is set, and {PREFIX}OIDC_AUDIENCE is not.",
            expected="the audience of this service. Without it, tokens for other services would be valid here.",
            advice=f"Set {PREFIX}OIDC_AUDIENCE to the value of `aud`.",
        )
    return OidcSettings(
        settings.oidc_issuer,
        settings.oidc_audience,
        settings.oidc_jwks,
        settings.oidc_scope_claim,
        parse_mapping(settings.oidc_scopes),
    )


def parse_mapping(text: str) -> dict[str, frozenset[Scope]]:
    """Return the scopes of each value of the claim, from a text such as "reader=read,admin=admin+read".

    Raises
    ------
    InvalidSettings
    """
    if not text.strip():
        return {scope: frozenset({scope}) for scope in SCOPES}
    mapping: dict[str, frozenset[Scope]] = {}
    for entry in text.split(","):
        value, _, names = entry.strip().rpartition("=")
        scopes = frozenset(names.split("+"))
        if not value or not scopes <= set(SCOPES):
            raise InvalidSettings(
                f"{PREFIX}OIDC_SCOPES has an entry without a value or with unknown scopes.",
                expected=f"VALUE=SCOPE+SCOPE,VALUE=SCOPE with the scopes {', '.join(SCOPES)}.",
                advice="Correct the setting.",
            )
        mapping[value] = cast("frozenset[Scope]", scopes)
    return mapping


class Issuer:
    """One OpenID Connect issuer.

    Parameters
    ----------
    settings : OidcSettings
    """

    def __init__(self, settings: OidcSettings) -> None:
        self.settings = settings
        self._keys: dict[str, PyJWK] = {}
        self._fetched = -KEEP_SECONDS
        self._tried = -REFRESH_PAUSE_SECONDS
        self._failed = False
        self._document: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._task: asyncio.Task[None] | None = None
        self._threads = ThreadGroup("issuer", 4, 3 * ISSUER_SECONDS)

    async def verify(self, token: str, audience: str | None = None) -> dict[str, Any]:
        """Return the claims of a valid token.

        Parameters
        ----------
        token : str
        audience : str, optional
            Expected audience, by default that of the settings.

        Raises
        ------
        Unauthorised
            The token is malformed, expired, wrongly signed, or meant for another service.
        IdentityUnavailable
            The keys of the issuer are not known, and it does not answer.
        """
        key = await self._find_key(_read_key_id(token))
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                audience=audience or self.settings.audience,
                issuer=self.settings.issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise _refuse(error) from None
        if not 0 < len(claims["sub"]) <= MAX_SUBJECT_LENGTH or not claims["sub"].isprintable():
            raise _refuse(jwt.InvalidTokenError())
        return claims

    def find_scopes(self, claims: Mapping[str, Any]) -> frozenset[Scope]:
        """Return the scopes that the claims of a verified token give."""
        value = _look_up(claims, self.settings.scope_claim)
        values = value.split() if isinstance(value, str) else value if isinstance(value, list) else []
        granted = [self.settings.mapping.get(name, frozenset()) for name in values if isinstance(name, str)]
        return frozenset().union(*granted)

    async def exchange_code(self, form: Mapping[str, str], headers: Mapping[str, str]) -> dict[str, Any]:
        """Return the answer of the token endpoint to an authorisation code.

        Raises
        ------
        Unauthorised
            The issuer refuses the code.
        IdentityUnavailable
        """
        url = await self.find_endpoint("token_endpoint")
        return await self._run(lambda: _fetch(url, urlencode(form).encode(), headers))

    async def find_endpoint(self, name: str) -> str:
        """Return a URL of the discovery document, such as `authorization_endpoint`.

        Raises
        ------
        IdentityUnavailable
        """
        document = await self._run(self._discover) if self._document is None else self._document
        return _web_address(document.get(name))

    async def _find_key(self, key_id: str) -> PyJWK:
        key = self._known_keys().get(key_id)
        if key is not None:
            if time.monotonic() - self._fetched > FRESH_SECONDS and self._may_refresh():
                self._task = asyncio.get_running_loop().create_task(self._run(self._refresh))
            return key
        if self._may_refresh() or self._lock.locked():
            await self._run(self._refresh)
        keys = self._known_keys()
        if key_id in keys:
            return keys[key_id]
        if self._failed or not keys:
            raise _unavailable()
        raise Unauthorised(
            "The token is signed with an unknown key.",
            expected="a key of the issuer.",
            advice="Get a new token. After a change of keys, try again in half a minute.",
        )

    def _known_keys(self) -> dict[str, PyJWK]:
        """Return the keys that may be used. A key that was fetched long ago may have been withdrawn."""
        return self._keys if time.monotonic() - self._fetched < KEEP_SECONDS else {}

    def _may_refresh(self) -> bool:
        return time.monotonic() - self._tried >= REFRESH_PAUSE_SECONDS

    def fetch_keys(self) -> dict[str, PyJWK]:
        """Fetch the keys of the issuer, by their id. One of `KEY_ERRORS` is raised if it does not answer."""
        url = self.settings.jwks or _web_address(self._discover().get("jwks_uri"))
        keys = PyJWKSet.from_dict(_fetch(url)).keys
        return {key.key_id: key for key in keys if key.key_id and key.public_key_use in {"sig", None}}

    def _refresh(self) -> None:
        """Fetch the keys, unless another thread has just done it."""
        with self._lock:
            if not self._may_refresh():
                return
            self._tried = time.monotonic()
            try:
                keys = self.fetch_keys()
            except KEY_ERRORS as error:
                self._failed = True
                log.warning("keys of the issuer not read", **error_location(error))
                return
            self._keys, self._fetched, self._failed = keys, time.monotonic(), False

    def _discover(self) -> dict[str, Any]:
        """Return the discovery document (OpenID Connect Discovery, section 4)."""
        if self._document is None:
            document = _fetch(self.settings.issuer.rstrip("/") + "/.well-known/openid-configuration")
            if document.get("issuer") != self.settings.issuer:
                raise IdentityUnavailable(
                    "The discovery document names another issuer than COUNTERPART_OIDC_ISSUER.",
                    expected="the same text in both, the last slash included.",
                    advice="The operator must correct COUNTERPART_OIDC_ISSUER.",
                )
            self._document = document
        return self._document

    async def _run(self, function: Callable[[], T]) -> T:
        try:
            return await self._threads.run(function)
        except TimeoutError:
            raise _unavailable() from None


def _read_key_id(token: str) -> str:
    """Return the id of the key that signed a token. Tokens without one, or of another algorithm, are refused."""
    try:
        header = jwt.get_unverified_header(token)
    except jwt.PyJWTError as error:
        raise _refuse(error) from None
    if header.get("alg") not in ALGORITHMS or not header.get("kid"):
        raise _refuse(jwt.InvalidAlgorithmError())
    return str(header["kid"])


def _look_up(claims: Mapping[str, Any], path: str) -> object:
    """Return a claim by its name, or by a path into objects, such as realm_access.roles."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _fetch(url: str, form: bytes | None = None, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a JSON object of the issuer.

    Raises
    ------
    Unauthorised
        The issuer refuses the form.
    IdentityUnavailable
    """
    opener = urllib.request.build_opener(NoRedirects)
    request = urllib.request.Request(url, form, dict(headers or {}))  # noqa: S310  # checked by `check_web_address`
    try:
        with opener.open(request, timeout=ISSUER_SECONDS) as response:
            answer = json.loads(response.read(MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        error.close()
        if form is not None and error.code < 500:
            raise Unauthorised(
                f"The issuer refused the login (status {error.code}).",
                expected="an authorisation code that was not used before.",
                advice="Log in again. The operator can check the client id, its secret and its redirect URI.",
            ) from None
        raise _unavailable() from None
    except (OSError, ValueError, http.client.HTTPException):
        raise _unavailable() from None
    if not isinstance(answer, dict):
        raise _unavailable()
    return answer


def _web_address(url: object) -> str:
    try:
        check_web_address(str(url).partition("?")[0])
    except ValueError:
        raise _unavailable() from None
    return str(url)


REASONS: dict[type[jwt.PyJWTError], str] = {
    jwt.ExpiredSignatureError: "The token has expired.",
    jwt.ImmatureSignatureError: "The token is not valid yet.",
    jwt.InvalidSignatureError: "The signature of the token is wrong.",
    jwt.InvalidAudienceError: "The token is meant for another service.",
    jwt.InvalidIssuerError: "The token comes from another issuer.",
    jwt.MissingRequiredClaimError: "The token lacks a claim.",
    jwt.InvalidAlgorithmError: "The token has no key id, or another algorithm than the accepted ones.",
}


def _refuse(error: jwt.PyJWTError) -> Unauthorised:
    return Unauthorised(
        REASONS.get(type(error), "The token is malformed."),
        expected=f"a token with exp, iss, aud and sub, signed by the issuer ({', '.join(ALGORITHMS)}).",
        advice="Get a new token. The operator can compare its claims with COUNTERPART_OIDC_ISSUER and _AUDIENCE.",
    )


def _unavailable() -> IdentityUnavailable:
    return IdentityUnavailable(
        "The issuer of the tokens does not answer as expected.",
        expected="a discovery document and keys (JWKS).",
        advice="Try again later (see Retry-After). The operator must check COUNTERPART_OIDC_ISSUER and the network.",
    )
