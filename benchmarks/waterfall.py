"""The waterfall before and after, and the share of the ceiling in each phase."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from app.runtime.bundle import Bundle, load_bundle
from benchmarks.ceiling import Ceiling
from benchmarks.trace import Trace, median_trace, totals, trace_scan
from training.config import Config

BEFORE = (
    "Before: the same scan, bundle and noise levels, with the networks as they come from training: eager torch, one "
    "slice at a time. After: the service. The paper's 250 evaluations a slice are a row of the table."
)


def before(bundle: Bundle, config: Config) -> Bundle:
    """The bundle as `BEFORE` says."""
    from benchmarks.networks import load_networks

    models = load_networks(bundle.folder, config).models()
    return replace(bundle, models=models, batch=1)


def _told(trace: Trace) -> dict[str, Any]:
    return {"spans": [asdict(s) for s in trace.spans], "phases": totals(trace.spans), "asked": trace.asked}


def measure_waterfall(folder: Path, config: Path, scan: Path, repeats: int, *, quick: bool) -> dict[str, Any]:
    """The service some times, its past once, and what a network evaluation costs.

    Parameters
    ----------
    folder : Path
        The bundle.
    config : Path
        That it was trained by.
    scan : Path
    repeats : int
    quick : bool
        Without the past.
    """
    from benchmarks.methods import network_gigaflops

    bundle, settings, ceiling = load_bundle(folder), Config.load(config), Ceiling()
    trace_scan(bundle, scan)  # first calls allocate
    traces, reached = [], []
    for _ in range(repeats):
        traces.append(trace_scan(bundle, scan))
        reached.append(ceiling.time())
    found = {
        "after": _told(median_trace(traces)),
        "seconds": [trace.seconds for trace in traces],
        "ceiling": reached,
        "gigaflops": network_gigaflops(folder, settings),
    }
    if not quick:
        found["before"] = _told(trace_scan(before(bundle, settings), scan))
    return found
