"""Where the seconds of one scan go: the pipeline's functions, wrapped from outside."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from app.runtime.bundle import Bundle

# Phase of each function, as its caller knows it. Renamed or moved: a test says so.
PHASES = {
    "app.analysis.read": "decode the file",
    "app.ingest.single._inflated": "inflate",
    "app.analysis._take_out": "extract the brain",
    "app.pipeline.detect.to_slices": "resample",
    "app.pipeline.anomaly.kl_map": "KL",
    "app.pipeline.gate.typical_kl": "gate",
    "app.pipeline.gate.reconstruction_error": "gate",
    "app.pipeline.anomaly.inpaint": "reverse",
    "app.analysis.to_result": "resample back",
    "app.analysis._write_images": "write",
    "app.analysis.write_preview": "write",
    "app.analysis._write_dicom": "write",
}
OTHER = "everything else"
# Not of the trace: a client's upload, measured over HTTP.
RECEIVE = "receive"
NETWORKS = ("encode", "denoise", "decode")
# The gate takes KL maps of its own.
LENT = ("denoise", "KL")
ORDER = (
    RECEIVE, "inflate", "decode the file", "extract the brain", "resample", "encode", "KL", "gate", "reverse", "decode",
    "resample back", "write", OTHER,
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """A stretch of time in one phase, seconds from the start of the scan; `network` while onnxruntime worked."""

    phase: str
    start: float
    end: float
    network: bool


class Tracer:
    """Time belongs to the innermost phase, so that the spans cover the scan once.

    Parameters
    ----------
    clock : callable
        Seconds.

    Attributes
    ----------
    spans : list of Span
    asked : dict
        Slices that each network was asked for, by phase.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._origin = clock, clock()
        self._since = 0.0
        self._open: list[tuple[str, bool]] = [(OTHER, False)]
        self.spans: list[Span] = []
        self.asked: dict[str, Counter[str]] = defaultdict(Counter)

    def _cut(self) -> None:
        now = self._clock() - self._origin
        if now > self._since:
            self.spans.append(Span(self._open[-1][0], self._since, now, self._open[-1][1]))
        self._since = now

    @contextmanager
    def phase(self, name: str, *, network: bool = False) -> Iterator[None]:
        """What happens inside is of this phase."""
        self._cut()
        self._open.append((name, network))
        try:
            yield
        finally:
            self._cut()
            self._open.pop()

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, as a phase; the denoiser and the KL map belong to whoever asks them."""

        def call(*args: Any, **kwargs: Any) -> Any:
            network = name in NETWORKS
            inside = self._open[-1][0]
            phase = inside if name in LENT and inside != OTHER else name
            if network:
                self.asked[phase][name] += len(args[0])
            with self.phase(phase, network=network):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Every function of `PHASES` is traced."""
        with ExitStack() as stack:
            for path, phase in PHASES.items():
                module, _, attribute = path.rpartition(".")
                stack.enter_context(patch(path, self.wrap(getattr(resolve_name(module), attribute), phase)))
            yield

    def finish(self) -> list[Span]:
        """All spans, the last one closed."""
        self._cut()
        return self.spans


def totals(spans: list[Span]) -> dict[str, dict[str, float]]:
    """Seconds of each phase: all of them, and those in which a network was evaluated."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0, "network": 0.0})
    for span in spans:
        sums[span.phase]["seconds"] += span.end - span.start
        sums[span.phase]["network"] += (span.end - span.start) * span.network
    return {phase: sums[phase] for phase in ORDER if phase in sums}


@dataclass(frozen=True)
class Trace:
    """One scan: its stretches of time, and the slices that each network was asked for, by phase."""

    spans: list[Span]
    asked: dict[str, dict[str, int]]

    @property
    def seconds(self) -> float:
        """From file to results."""
        return self.spans[-1].end


def trace_scan(bundle: "Bundle", scan: Path) -> Trace:
    """Analyse a scan as `counterpart detect` does, its bundle loaded, and tell where the time went."""
    from app.analysis import AnalysisRequest, analyse
    from app.pipeline.models import Models

    tracer = Tracer()
    networks = (tracer.wrap(getattr(bundle.models, name), name) for name in NETWORKS)
    traced = replace(bundle, models=Models(*networks))
    with TemporaryDirectory() as out, tracer.attached():
        analyse(scan, Path(out), lambda _: traced, (bundle.manifest,), AnalysisRequest(), lambda *_: None)
    return Trace(tracer.finish(), {phase: dict(counts) for phase, counts in tracer.asked.items()})


def median_trace(traces: Sequence[Trace]) -> Trace:
    """The repeat that took the median time: its parts belong together."""
    return sorted(traces, key=lambda trace: trace.seconds)[(len(traces) - 1) // 2]
