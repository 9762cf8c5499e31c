"""Waterfall of one scan: its phases with the networks in eager torch ("before") and in the service ("after")."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from app.runtime.bundle import load_bundle
from benchmarks.trace import PHASES, Span, median_trace, sum_phases, trace_scan
from training.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"before": "before: networks in eager torch, one slice at a time", "after": "after: the service"}
COLOURS = {False: ("outside the networks", "tab:blue"), True: ("networks", "tab:orange")}


def measure_waterfall(folder: Path, config: Path, scan: Path, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Trace the service `repeats` times and eager torch once.

    Parameters
    ----------
    folder : Path
        The bundle.
    config : Path
        Configuration of its training.
    scan : Path
    repeats : int
    quick : bool
        Omit eager torch.
    """
    bundle = load_bundle(folder)
    with TemporaryDirectory() as out:
        trace_scan(bundle, scan, Path(out))  # the first evaluations allocate memory
        traces = [trace_scan(bundle, scan, Path(out)) for _ in range(repeats)]
        measured = {"after": _describe(median_trace(traces)), "seconds": [spans[-1].end for spans in traces]}
        if not quick:
            from training.networks import load_networks

            eager = load_networks(folder, Config.load(config)).models()
            measured["before"] = _describe(trace_scan(replace(bundle, batch=1), scan, Path(out), eager))
    return measured


def _describe(spans: Sequence[Span]) -> dict[str, Any]:
    return {"spans": [asdict(span) for span in spans], "phases": sum_phases(spans)}


def draw_waterfall(measured: dict[str, Any], path: Path) -> None:
    """Draw one bar per span, one line per phase, with "before" above "after"."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    traces = {name: [Span(**s) for s in measured[name]["spans"]] for name in TITLES if name in measured}
    phases = [phase for phase in PHASES if any(s.phase == phase for spans in traces.values() for s in spans)]
    size = (10, len(traces) * (0.35 * len(phases) + 1.0))
    figure, axes = plt.subplots(len(traces), figsize=size, layout="constrained", squeeze=False)
    for lane, (name, spans) in zip(axes[:, 0], traces.items(), strict=True):
        _draw_spans(lane, spans, phases)
        lane.set_title(f"{TITLES[name]}, {spans[-1].end:.1f} s")
    axes[-1, 0].set_xlabel("seconds from the start of the scan")
    axes[0, 0].legend(loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_spans(axes: "Axes", spans: Sequence[Span], phases: Sequence[str]) -> None:
    for network, (label, colour) in COLOURS.items():
        shown = [s for s in spans if s.network == network]
        lines = [phases.index(s.phase) for s in shown]
        axes.barh(lines, [s.end - s.start for s in shown], left=[s.start for s in shown], color=colour, label=label)
    sums = [sum(s.end - s.start for s in spans if s.phase == phase) for phase in phases]
    axes.set_yticks(range(len(phases)), [f"{p}: {t:.2f} s" for p, t in zip(phases, sums, strict=True)])
    axes.invert_yaxis()
