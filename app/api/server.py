"""HTTP in front of the routers: connections, measurement, log and checks of every request.

A request passes `HttpProtocol`, `RequestTelemetry`, `AccessLog` and `RequestGuard` before its route. uvicorn refuses
malformed requests, and requests above its limit, in plain text. Here they are problems, like every other error.

The log has no patient data: only
listed keys are written. The messages of libraries and the texts of exceptions are dropped, because they may contain
file names, URLs or header values. Such a record keeps the logger, the location and the class of the exception.
"""

import asyncio
import logging
import re
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from http import HTTPStatus
from typing import Any

import h11
import structlog
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import EventDict, Processor
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.api.identity import Principal, find_job
from app.api.problems import problem_of, problem_response
from app.errors import (
    BadRequest,
    CounterpartError,
    ForeignHost,
    ForeignOrigin,
    HeaderTooLarge,
    NotReady,
    TooManyConnections,
    UploadTooSlow,
    error_location,
)
from app.jobs.metrics import Metrics
from app.jobs.traces import Span, Traces
from app.settings import Settings, is_loopback

# Seconds for the head of a request. A slower connection is closed.
HEADER_SECONDS = 20.0
# Open connections of all callers. Further requests get status 503 at once.
MAX_CONNECTIONS = 4000
# Longest head of a request that is parsed in parts, in bytes.
MAX_HEADER_BYTES = 1 << 14
# Status that h11 proposes for a head longer than it accepts.
TOO_LARGE = 431

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

# Label of a path that no route serves. The path itself may be any text.
NO_ROUTE = "none"

# Probes and scrapes name a machine by its address. With a token, these routes answer under every name.
PROBE_ROUTES = frozenset({"/livez", "/readyz", "/metrics"})
# Values of Sec-Fetch-Site for a request of the service's own pages, or of a person who typed the address.
OWN_SITES = frozenset({"same-origin", "none"})
# A NUL, encoded or not. PostgreSQL stores none, and no parameter needs one.
NUL = re.compile(rb"%00|\x00")

log = structlog.get_logger("counterpart.http")


# ---- connections -------------------------------------------------------------------------------


class HttpProtocol(H11Protocol):
    """Protocol that closes a connection whose request does not arrive, and answers every error with a problem."""

    _header_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routes = self.app
        self.app = self._answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_header_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # IDLE: the head of a request is incomplete.
        if self.conn.their_state is not h11.IDLE:
            self._cancel_header_timer()
        elif self._header_timer is None:
            self._set_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_header_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. uvicorn calls this while it handles the exception of h11."""
        del msg
        exception = sys.exception()
        hint = exception.error_status_hint if isinstance(exception, h11.RemoteProtocolError) else 400
        self._refuse(_header_too_large() if hint == TOO_LARGE else _not_http())

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, also if there are too many connections or the process ends."""
        if len(self.connections) > MAX_CONNECTIONS:
            await _to_response(_too_many_connections())(scope, receive, send)
            return
        started = False

        async def send_and_remember(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._routes(scope, receive, send_and_remember)
        except asyncio.CancelledError:  # the server ends, and this request takes too long
            if started:
                raise
            await _to_response(_stopping())(scope, receive, send)

    def _refuse(self, error: CounterpartError) -> None:
        """Send a problem without a request, and close the connection."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            response = _to_response(error)
            head = h11.Response(
                status_code=response.status_code, headers=response.raw_headers, reason=_phrase(response)
            )
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _set_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._close_if_idle)

    def _cancel_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close_if_idle(self) -> None:
        self._header_timer = None
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self._refuse(_head_too_slow())
        self.transport.close()


def _phrase(response: JSONResponse) -> bytes:
    return HTTPStatus(response.status_code).phrase.encode()


def _to_response(error: CounterpartError) -> JSONResponse:
    return problem_response(problem_of(error), {"Connection": "close"})


def _not_http() -> BadRequest:
    return BadRequest(
        "The request is not valid HTTP/1.1.",
        expected="a request line, header fields and a body of the announced length (RFC 9112).",
        advice="Use an HTTP library, and check the URL scheme: this port may expect http, not https.",
    )


def _header_too_large() -> HeaderTooLarge:
    return HeaderTooLarge(
        "The request line and the header fields are too long.",
        expected=f"at most {MAX_HEADER_BYTES >> 10} KiB.",
        advice="Send parameters in the query and the scan in the body.",
    )


def _head_too_slow() -> UploadTooSlow:
    return UploadTooSlow(
        f"The head of the request did not arrive within {HEADER_SECONDS:g} s.",
        expected="a request line and header fields without long breaks.",
        advice="Send the request again.",
    )


def _too_many_connections() -> TooManyConnections:
    return TooManyConnections(
        f"More than {MAX_CONNECTIONS} connections are open.",
        expected="fewer connections.",
        advice="Try again later (see Retry-After), and close connections that are not used.",
    )


def _stopping() -> NotReady:
    return NotReady(
        "The service stops, and the request is not finished.",
        expected="a running service.",
        advice="Send the request again when the service has started (see Retry-After).",
    )


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
    # The texts of warnings can contain a patient's values. As records, they lose it in `_drop_message`.
    logging.captureWarnings(capture=True)
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


# ---- measurement --------------------------------------------------------------------------------


class RequestTelemetry:
    """Middleware that measures the time until the response begins, and records a span of the whole request.

    An event stream or a download lasts as long as its reader wants, so its end is not part of the latency.

    Parameters
    ----------
    app : ASGIApp
    metrics : Metrics
    traces : Traces or None
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, traces: Traces | None) -> None:
        self._app = app
        self._metrics = metrics
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in LOGGED_METHODS else "OTHER"
        start, begun, status = time.perf_counter(), None, 500

        async def record_start(message: Message) -> None:
            nonlocal begun, status
            if message["type"] == "http.response.start":
                begun, status = time.perf_counter(), message["status"]
            await send(message)

        parent = Headers(scope=scope).get("traceparent", "")
        with self._traces.span(method, traceparent=parent) if self._traces else nullcontext(Span(method)) as span:
            try:
                await self._app(scope, receive, record_start)
            finally:
                route = getattr(scope.get("route"), "path", NO_ROUTE)
                seconds = (begun or time.perf_counter()) - start
                self._metrics.request_seconds.labels(method, route, status).observe(seconds)
                span.name = f"{method} {route}"
                span.attributes |= {
                    "http.request.method": method,
                    "http.route": route,
                    "http.response.status_code": status,
                }
                span.failed = status >= 500


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
