"""OpenTelemetry traces of requests and job steps, if the operator names a collector.

A span carries a name and attributes that the caller lists. It never carries a path, a query, a header or the text of an
exception, because these may contain patient data. The provider is not global, so that the spans of libraries, which
contain query strings, are not exported.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from app import __version__
from app.errors import MissingExtra

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor


@dataclass
class Span:
    """Name and attributes of a span. The caller may change them until the span ends.

    Attributes
    ----------
    name : str
    attributes : dict
    failed : bool
        The service, not the caller, is at fault.
    """

    name: str
    attributes: dict[str, str | int] = field(default_factory=dict)
    failed: bool = False


class Traces(Protocol):
    """Source of spans."""

    def span(self, name: str, *, traceparent: str | None = None) -> AbstractContextManager[Span]:
        """Return a context that lasts as long as the span.

        Parameters
        ----------
        name : str
        traceparent : str, optional
            Header of the caller (W3C Trace Context). The span is then a part of the caller's trace.
        """

    def close(self) -> None:
        """Send the remaining spans."""


class NoTraces:
    """Traces that are not recorded."""

    @contextmanager
    def span(self, name: str, *, traceparent: str | None = None) -> Iterator[Span]:  # noqa: ARG002
        """Yield a span that nobody reads."""
        yield Span(name)

    def close(self) -> None:
        """Do nothing."""


class ExportedTraces:
    """Traces that a processor exports.

    Parameters
    ----------
    processor : opentelemetry.sdk.trace.SpanProcessor
    """

    def __init__(self, processor: "SpanProcessor") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "counterpart", "service.version": __version__})
        # `close` ends the provider. Without it, the interpreter would wait for an absent collector at its exit.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("counterpart", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, name: str, *, traceparent: str | None = None) -> Iterator[Span]:
        """Yield a span and export it at its end. An exception marks it as failed, without its text."""
        from opentelemetry.trace import SpanKind, StatusCode

        parent = self._propagator.extract({"traceparent": traceparent} if traceparent else {})
        kind = SpanKind.SERVER if traceparent is not None else SpanKind.INTERNAL
        recorded = self._tracer.start_span(name, parent, kind)
        span = Span(name)
        try:
            yield span
        except BaseException:
            span.failed = True
            raise
        finally:
            recorded.update_name(span.name)
            recorded.set_attributes(span.attributes)
            if span.failed:
                recorded.set_status(StatusCode.ERROR)
            recorded.end()

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()


def create_traces(url: str | None) -> Traces:
    """Return the traces for the URL of a collector (OTLP over HTTP), or `NoTraces` if there is none.

    Raises
    ------
    MissingExtra
        OpenTelemetry is not installed.
    """
    if url is None:
        return NoTraces()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MissingExtra(
            "COUNTERPART_TRACES is set, and OpenTelemetry is not installed.",
            expected="the extra `otel`.",
            advice="pip install 'counterpart[otel]', or unset COUNTERPART_TRACES.",
        ) from None
    return ExportedTraces(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{url.rstrip('/')}/v1/traces")))
