"""Structured logs without patient data: only listed keys are written.

The messages of libraries and the texts of exceptions are dropped, because they may contain file names, URLs or
header values. Such a record keeps the logger, the location and the class of the exception.
"""

import logging
import sys
import time
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import EventDict, Processor

from app.api.audit import find_job
from app.api.identity import Principal
from app.errors import error_location

ALLOWED_KEYS = frozenset(
    {
        *("actor", "event", "level", "timestamp", "logger", "exception", "where"),
        *("job", "stage", "code", "seconds", "model", "provider"),
        *("method", "route", "status", "host", "port"),
    }
)
# Probes and scrapes call these routes every few seconds. Only their errors are logged.
UNLOGGED_ROUTES = frozenset({"/livez", "/readyz", "/metrics"})
# A caller can send any text as the method.
LOGGED_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})

log = structlog.get_logger("counterpart.http")


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
