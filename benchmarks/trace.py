"""Instruments: counter of network evaluations, and a trace of the time of one scan by phase."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

from app.pipeline.diffusion import Networks
from app.runtime.bundle import Bundle
from app.volume import FloatArray

# Attributes of the pipeline's networks.
NETWORKS = ("encode", "denoise", "decode")
READ, DECOMPRESS, EXTRACT, RESAMPLE = "read the file", "decompress", "extract the brain", "resample"
KL, OOD, REVERSE = "KL map", "out-of-distribution check", "reverse process"
RESAMPLE_BACK, WRITE, OTHER = "resample back", "write the results", "other"
# Order of the figure and the table.
PHASES = (DECOMPRESS, READ, EXTRACT, RESAMPLE, "encode", KL, OOD, REVERSE, "decode", RESAMPLE_BACK, WRITE, OTHER)
# Traced functions, as their callers look them up.
TRACED = {
    "app.analysis.read_scan": READ,
    "app.ingest.volume_file._inflate": DECOMPRESS,
    "app.analysis._run_extractor": EXTRACT,
    "app.pipeline.detect.to_slices": RESAMPLE,
    "app.pipeline.scores.kl_map": KL,
    "app.pipeline.out_of_distribution.median_kl_ranges": OOD,
    "app.pipeline.out_of_distribution.reconstruction_error": OOD,
    "app.pipeline.diffusion.inpaint": REVERSE,
    "app.analysis.to_scan_result": RESAMPLE_BACK,
    "app.analysis.write_outputs": WRITE,
}
# The denoiser, and the KL maps of the out-of-distribution check, count for the phase that calls them.
COUNTED_BY_CALLER = ("denoise", KL)


def count_evaluations(networks: Networks, counts: Counter[str]) -> Networks:
    """Wrap networks so that `counts` has the number of slices that each network was evaluated on."""

    def counted(name: str) -> Callable[..., FloatArray]:
        def call(*arrays: Any) -> FloatArray:
            counts[name] += len(arrays[0])
            result: FloatArray = getattr(networks, name)(*arrays)
            return result

        return call

    return Networks(*map(counted, NETWORKS))


@dataclass(frozen=True)
class Span:
    """Time span in one phase.

    Attributes
    ----------
    phase : str
    start, end : float
        Seconds from the start of the scan.
    network : bool
        A network was evaluated.
    """

    phase: str
    start: float
    end: float
    network: bool


class Tracer:
    """Recorder of spans. Nested phases count for the innermost, so the spans do not overlap.

    Parameters
    ----------
    clock : callable
        Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._origin = clock, clock()
        self._since = 0.0
        self._open: list[tuple[str, bool]] = [(OTHER, False)]
        self._spans: list[Span] = []

    def _close_span(self) -> None:
        now = self._clock() - self._origin
        if now > self._since:
            self._spans.append(Span(self._open[-1][0], self._since, now, self._open[-1][1]))
        self._since = now

    @contextmanager
    def phase(self, name: str, *, network: bool = False) -> Iterator[None]:
        """Count the time inside the block for a phase."""
        self._close_span()
        self._open.append((name, network))
        try:
            yield
        finally:
            self._close_span()
            self._open.pop()

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return the function, traced as a phase or a network."""

        def call(*args: Any, **kwargs: Any) -> Any:
            caller = self._open[-1][0]
            phase = caller if name in COUNTED_BY_CALLER and caller != OTHER else name
            with self.phase(phase, network=name in NETWORKS):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Trace all functions of `TRACED` inside the block."""
        with ExitStack() as stack:
            for path, phase in TRACED.items():
                module, _, attribute = path.rpartition(".")
                stack.enter_context(patch(path, self.wrap(getattr(resolve_name(module), attribute), phase)))
            yield

    def finish(self) -> list[Span]:
        """Close the last span and return all spans."""
        self._close_span()
        return self._spans


def sum_phases(spans: Sequence[Span]) -> dict[str, dict[str, float]]:
    """Return the seconds of each phase, and those of them in which a network was evaluated."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0, "network": 0.0})
    for span in spans:
        sums[span.phase]["seconds"] += span.end - span.start
        sums[span.phase]["network"] += (span.end - span.start) * span.network
    return {phase: sums[phase] for phase in PHASES if phase in sums}


def trace_scan(bundle: Bundle, scan: Path, out: Path, networks: Networks | None = None) -> list[Span]:
    """Analyse a scan as `counterpart detect` does, with a loaded bundle, and return its spans.

    Parameters
    ----------
    bundle : Bundle
    scan : Path
    out : Path
        Existing folder for the results.
    networks : Networks, optional
        Networks that replace those of the bundle.
    """
    from app.analysis import AnalysisRequest, analyse  # rows import this module, and their memory is measured

    tracer = Tracer()
    networks = networks or bundle.networks
    traced = replace(bundle, networks=Networks(*(tracer.wrap(getattr(networks, name), name) for name in NETWORKS)))
    with tracer.attached():
        analyse(scan, out, lambda _: traced, (bundle.manifest,), AnalysisRequest(), lambda *_: None)
    return tracer.finish()


def median_trace(traces: Sequence[list[Span]]) -> list[Span]:
    """Return the trace with the median total time."""
    return sorted(traces, key=lambda spans: spans[-1].end)[(len(traces) - 1) // 2]
