"""Where the seconds of one scan go: the pipeline's functions, wrapped from outside."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

# Phase of each function, as its caller knows it. Renamed or moved: a test says so.
PHASES = {
    "app.analyse.read": "read",
    "app.ingest.single._inflated": "inflate",
    "app.analyse._take_out": "extract the brain",
    "app.pipeline.detect.to_slices": "prepare",
    "app.pipeline.anomaly.kl_map": "KL",
    "app.pipeline.detect.typical_kl": "gate",
    "app.pipeline.detect.reconstruction_error": "gate",
    "app.pipeline.anomaly.inpaint": "reverse",
    "app.analyse.to_result": "back to the scan's grid",
    "app.analyse._write_images": "write",
    "app.analyse.write_preview": "write",
    "app.analyse._write_dicom": "write",
}
OTHER = "everything else"
NETWORKS = ("encode", "denoise", "decode")
# The gate takes KL maps of its own.
LENT = ("denoise", "KL")
ORDER = (
    "read", "inflate", "extract the brain", "prepare", "encode", "KL", "gate", "reverse", "decode",
    "back to the scan's grid", "write", OTHER,
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
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._origin = clock, clock()
        self._since = 0.0
        self._open: list[tuple[str, bool]] = [(OTHER, False)]
        self.spans: list[Span] = []

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
            with self.phase(inside if name in LENT and inside != OTHER else name, network=network):
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


def trace_scan(folder: Path, scan: Path, threads: int = 0) -> list[Span]:
    """Analyse a scan as `counterpart detect` does, its bundle loaded, and tell where the time went."""
    from app.analyse import Request, analyse
    from app.pipeline.models import Models
    from app.runtime.bundle import load_bundle

    bundle = load_bundle(folder, "cpu", threads)
    tracer = Tracer()
    networks = (tracer.wrap(getattr(bundle.models, name), name) for name in NETWORKS)
    traced = replace(bundle, models=Models(*networks))
    with TemporaryDirectory() as out, tracer.attached():
        analyse(scan, Path(out), lambda _: traced, (bundle.manifest,), Request(), lambda *_: None)
    return tracer.finish()
