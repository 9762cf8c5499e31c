"""The waterfall, one line a phase, one bar a stretch of time; and time against what grows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.trace import ORDER, Span

COLOURS = {True: "tab:orange", False: "tab:blue"}


def draw_waterfall(found: dict[str, Any], path: Path) -> None:
    """Seconds from the start of the scan, from left to right: before, where it was measured, and after."""
    traces = {name: [Span(**span) for span in found[name]["spans"]] for name in ("before", "after") if name in found}
    phases = [phase for phase in ORDER if any(s.phase == phase for spans in traces.values() for s in spans)]
    height = len(traces) * (0.35 * len(phases) + 1.0)
    figure, axes = plt.subplots(len(traces), figsize=(10, height), layout="constrained", squeeze=False)
    for lane, (name, spans) in zip(axes[:, 0], traces.items(), strict=True):
        _draw_spans(lane, spans, phases)
        lane.set_title(f"{name}: {spans[-1].end:.1f} s")
    axes[-1, 0].set_xlabel("seconds from the start of the scan")
    axes[0, 0].legend(loc="upper right")
    _save(figure, path)


def _draw_spans(axes: Axes, spans: Sequence[Span], phases: Sequence[str]) -> None:
    for network, label in ((False, "numbers and files"), (True, "networks")):
        mine = [s for s in spans if s.network == network]
        lines = [phases.index(s.phase) for s in mine]
        starts = [s.start for s in mine]
        axes.barh(lines, [s.end - s.start for s in mine], left=starts, color=COLOURS[network], label=label)
    sums = [sum(s.end - s.start for s in spans if s.phase == phase) for phase in phases]
    axes.set_yticks(range(len(phases)), [f"{p}: {t:.2f} s" for p, t in zip(phases, sums, strict=True)])
    axes.invert_yaxis()


def draw_scaling(found: dict[str, Any], path: Path) -> None:
    """Seconds against slices, size of a voxel and scans at once."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for lane, key, label in ((axes[0], "slices", "share of the slices"), (axes[1], "resolution", "voxel, mm")):
        points = found[key]
        lane.plot([p["value"] for p in points], [_median(p["runs"]) for p in points], "o-")
        lane.set_xlabel(label)
    for workers in sorted({p["workers"] for p in found["together"]}):
        points = [p for p in found["together"] if p["workers"] == workers]
        medians = [float(np.median(p["seconds"])) for p in points]
        axes[2].plot([p["scans"] for p in points], medians, "o-", label=f"workers: {workers}")
    axes[2].set_xlabel("scans at once")
    axes[2].legend()
    for lane in axes:
        lane.set_ylim(bottom=0)
        lane.set_ylabel("seconds to the last mask")
    _save(figure, path)


def _median(runs: Sequence[dict[str, Any]]) -> float:
    return float(np.median([run["seconds"] for run in runs]))


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
