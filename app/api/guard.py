"""Checks of every request before its route: the host, the site that sends it, and the characters of its query."""

import re
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import problem_of, problem_response
from app.errors import BadRequest, CounterpartError, ForeignHost, ForeignOrigin
from app.settings import Settings, is_loopback

# Probes and scrapes name a machine by its address. With a token, these routes answer under every name.
PROBE_ROUTES = frozenset({"/livez", "/readyz", "/metrics"})
# Values of Sec-Fetch-Site for a request of the service's own pages, or of a person who typed the address.
OWN_SITES = frozenset({"same-origin", "none"})
# A NUL, encoded or not. PostgreSQL stores none, and no parameter needs one.
NUL = re.compile(rb"%00|\x00")


class RequestGuard:
    """Middleware that refuses requests of foreign sites, and forbids browsers to guess media types.

    It also sets the path prefix of the proxy.

    A web page can send requests to a service on loopback: directly, or under a name of its own that it binds to
    127.0.0.1 (DNS rebinding). A service with a token refuses both already, because the page does not know the token.

    Parameters
    ----------
    app : ASGIApp
    settings : Settings
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._has_token = settings.token is not None
        self._hosts = settings.accepted_hosts
        self._root_path = settings.root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        scope["root_path"] = self._root_path or scope.get("root_path", "")

        async def add_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault("X-Content-Type-Options", "nosniff")
            await send(message)

        try:
            self._check(scope)
        except CounterpartError as error:
            await problem_response(problem_of(error))(scope, receive, send)
        else:
            await self._app(scope, receive, add_header)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if NUL.search(scope["query_string"]) or "\0" in scope["path"]:
            raise BadRequest(
                "The URL has a NUL character.",
                expected="text without NUL characters.",
                advice="Remove the character (%00).",
            )
        if self._has_token:
            if self._hosts and scope["path"].removeprefix(self._root_path) not in PROBE_ROUTES:
                self._check_listed_host(headers)
        else:
            self._check_loopback_host(headers)
            self._check_origin(scope["method"], headers)

    def _check_listed_host(self, headers: Mapping[str, str]) -> None:
        name = host_name(headers.get("host", ""))
        if name.strip("[]") not in {host.strip("[]") for host in self._hosts} and not is_loopback(name):
            raise ForeignHost(
                "The Host header names a host that is not listed.",
                expected="a host of COUNTERPART_HOSTS, or a loopback address.",
                advice="Correct the URL, or ask the operator to add the host to COUNTERPART_HOSTS.",
            )

    def _check_loopback_host(self, headers: Mapping[str, str]) -> None:
        if not is_loopback(host_name(headers.get("host", ""))):
            raise ForeignHost(
                "The Host header does not name this machine, and the service has no token.",
                expected="127.0.0.1, localhost or [::1].",
                advice="Use a loopback address in the URL, or set COUNTERPART_TOKEN to serve other names.",
            )

    def _check_origin(self, method: str, headers: Mapping[str, str]) -> None:
        # A link to /docs on another page is harmless: that page cannot read the answer.
        is_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        site = headers.get("sec-fetch-site", "none").lower()
        origin = headers.get("origin")
        is_own = origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()
        if not is_own or (site not in OWN_SITES and not is_link):
            raise ForeignOrigin(
                "A web page of another site sent the request, and the service has no token.",
                expected="a request of a program, or of the service's own pages.",
                advice="Call the service from a program, or set COUNTERPART_TOKEN.",
            )


def host_name(authority: str) -> str:
    """Return the name or address of a Host header without its port, in lower case; "" if it is malformed."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d*)?", authority.strip().lower(), re.ASCII)
    return (match[1] or match[2]) if match else ""
