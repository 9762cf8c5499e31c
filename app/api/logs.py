"""Structured logs that cannot tell a patient's data: keys are allowed one by one, the rest is dropped.

Messages of libraries are dropped too, with the text of their exceptions: file names, URLs and values
end up in both. What is left of such a record is who wrote it, where, and the exception's class.
"""

import logging
import sys
import time
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import EventDict, Processor

from app.errors import error_location

ALLOWED = frozenset(
    {
        *("event", "level", "timestamp", "logger", "exception", "where"),
        *("job", "stage", "code", "seconds", "model", "provider"),
        *("method", "route", "status", "host", "port"),
    }
)

log = structlog.get_logger("counterpart.http")


def configure() -> None:
    """Send every log of the process through the allow-list to standard error; JSON unless a person looks on."""
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
            foreign_pre_chain=[*shared, _without_message],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _allowed, renderer],
        )
    )
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("counterpart").setLevel(logging.INFO)


class AccessLog:
    """One line a request: the route's template, never the path or the query."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", None)
            seconds = round(time.perf_counter() - start, 3)
            # Probes and scrapes come every few seconds.
            quiet = status < 400 and route in {"/livez", "/readyz", "/metrics"}
            if not quiet:
                log.info("request", method=scope["method"], route=route, status=status, seconds=seconds)


def _without_message(_: Any, __: str, event: EventDict) -> EventDict:
    """Reduce a library's record to where it came from."""
    record: logging.LogRecord = event["_record"]
    error = record.exc_info[1] if record.exc_info else None
    return {
        **{key: event[key] for key in ("level", "logger", "timestamp", "_record", "_from_structlog") if key in event},
        "event": "library",
        **(error_location(error) if error else {"where": f"{record.filename}:{record.lineno}"}),
    }


def _allowed(_: Any, __: str, event: EventDict) -> EventDict:
    return {key: value for key, value in event.items() if key in ALLOWED}
