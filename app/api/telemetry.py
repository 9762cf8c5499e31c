"""Measurement of each request: a histogram and a span, with the template of the route and without ids."""

import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.server import LOGGED_METHODS
from app.jobs.metrics import Metrics
from app.jobs.traces import Traces

# Label of a path that no route serves. The path itself may be any text.
NO_ROUTE = "none"


class RequestTelemetry:
    """Middleware that measures the time until the response begins, and records a span of the whole request.

    An event stream or a download lasts as long as its reader wants, so its end is not part of the latency.

    Parameters
    ----------
    app : ASGIApp
    metrics : Metrics
    traces : Traces
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, traces: Traces) -> None:
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

        with self._traces.span(method, traceparent=Headers(scope=scope).get("traceparent", "")) as span:
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
