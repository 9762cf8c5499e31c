"""HTTP server in front of the routers: connections, checks and log of every request.

A request passes `HttpProtocol`, `AccessLog` and `RequestGuard` before its route. The log has no patient data: only
listed keys are written. The messages of libraries and the texts of exceptions are dropped, because they may contain
file names, URLs or header values. Such a record keeps the logger, the location and the class of the exception.
"""

import asyncio
import logging
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import structlog
import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import EventDict, Processor

from app.api.audit import find_job
from app.api.identity import Principal
from app.api.problems import problem_of, problem_response
from app.api.protocol import MAX_HEADER_BYTES, HttpProtocol
from app.errors import AddressUnavailable, BadRequest, CounterpartError, ForeignHost, ForeignOrigin, error_location
from app.settings import Settings, is_loopback

KEEP_ALIVE_SECONDS = 15
BACKLOG = 1024

ALLOWED_KEYS = frozenset(
    {
        *("actor", "event", "level", "timestamp", "logger", "exception", "where"),
        *("job", "stage", "code", "seconds", "model", "provider"),
        *("method", "route", "status", "host", "port"),
        *("aet", "address", "outcome", "instances", "refused", "series_count", "target", "result", "attempts"),
    }
)
# Probes and scrapes call these routes every few seconds. Only their errors are logged.
UNLOGGED_ROUTES = frozenset({"/livez", "/readyz", "/metrics"})
# A caller can send any text as the method.
LOGGED_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})

# Probes and scrapes name a machine by its address. With a token, these routes answer under every name.
PROBE_ROUTES = frozenset({"/livez", "/readyz", "/metrics"})
# Values of Sec-Fetch-Site for a request of the service's own pages, or of a person who typed the address.
OWN_SITES = frozenset({"same-origin", "none"})
# A NUL, encoded or not. PostgreSQL stores none, and no parameter needs one.
NUL = re.compile(rb"%00|\x00")

log = structlog.get_logger("counterpart.http")


# ---- server ------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """Server that announces its end, so that waiting callers get an answer.

    Parameters
    ----------
    config : uvicorn.Config
    on_stop : callable
        Called on the event loop when a signal stops the server.
    """

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._on_stop)


def open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address.

    Raises
    ------
    AddressUnavailable
    """
    listener: socket.socket | None = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio disables Nagle's algorithm only if the socket names its protocol.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise AddressUnavailable(
            f"The service cannot listen on {host}, port {port}: {error.strerror or type(error).__name__}.",
            expected="an address of this machine, and a port that no other program uses.",
            advice="Stop the other program, or choose another port with --port or COUNTERPART_PORT.",
        ) from None
    return listener


def run_server(app: ASGIApp, listener: socket.socket, on_stop: Callable[[], None], **options: Any) -> None:
    """Serve an application until a signal stops the process."""
    config = uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        log_config=None,
        access_log=False,  # uvicorn's access log contains query strings
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        headers=[("X-Content-Type-Options", "nosniff")],
        **options,
    )
    Server(config, on_stop).run(sockets=[listener])


# ---- log ---------------------------------------------------------------------------------------


def configure_logging() -> None:
    """Write every log of the process to standard error: JSON, or coloured text on a terminal."""
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Processor = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _drop_message],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _keep_allowed_keys, renderer],
        )
    )
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("counterpart").setLevel(logging.INFO)


def _drop_message(_: Any, __: str, event: EventDict) -> EventDict:
    """Reduce the record of a library to its logger, level and location."""
    record: logging.LogRecord = event["_record"]
    error = record.exc_info[1] if record.exc_info else None
    return {
        **{key: event[key] for key in ("level", "logger", "timestamp", "_record", "_from_structlog") if key in event},
        "event": "library message",
        **(error_location(error) if error else {"where": f"{record.filename}:{record.lineno}"}),
    }


def _keep_allowed_keys(_: Any, __: str, event: EventDict) -> EventDict:
    return {key: value for key, value in event.items() if key in ALLOWED_KEYS}


class AccessLog:
    """Middleware that logs each request with the template of its route, never with its path or query."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, record_status)
        finally:
            route = getattr(scope.get("route"), "path", None)
            seconds = round(time.perf_counter() - start, 3)
            if status >= 400 or route not in UNLOGGED_ROUTES:
                method = scope["method"] if scope["method"] in LOGGED_METHODS else "OTHER"
                found = {"actor": find_actor(scope), "job": find_job(scope)}
                names = {key: name for key, name in found.items() if name}
                log.info("request", method=method, route=route, status=status, seconds=seconds, **names)


def find_actor(scope: Scope) -> str | None:
    """Return the pseudonym of the caller, None if it is not known."""
    principal: Principal | None = scope.get("state", {}).get("principal")
    return principal.pseudonym if principal else None


# ---- checks of every request -------------------------------------------------------------------


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
        self._has_token = settings.has_access_control
        self._hosts = settings.accepted_hosts
        self._root_path = settings.root_path
        self._origins = settings.allowed_origins

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
        if origin in self._origins:
            return
        if not is_own or (site not in OWN_SITES and not is_link):
            raise ForeignOrigin(
                "A web page of another site sent the request, and the service has no token.",
                expected="a request of a program, or of the service's own pages.",
                advice="Call the service from a program, set COUNTERPART_TOKEN, or ask the operator to add the site to "
                "COUNTERPART_CORS_ORIGINS.",
            )


def host_name(authority: str) -> str:
    """Return the name or address of a Host header without its port, in lower case; "" if it is malformed."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d*)?", authority.strip().lower(), re.ASCII)
    return (match[1] or match[2]) if match else ""
