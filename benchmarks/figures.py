"""The waterfall: one line a phase, one bar a stretch of time."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.trace import ORDER, Span

COLOURS = {True: "tab:orange", False: "tab:blue"}


def draw_waterfall(spans: Sequence[Span], path: Path) -> None:
    """Seconds from the start of the scan, from left to right."""
    phases = [phase for phase in ORDER if any(s.phase == phase for s in spans)]
    figure, axes = plt.subplots(figsize=(10, 0.4 * len(phases) + 1.2), layout="constrained")
    for network, label in ((False, "numbers and files"), (True, "networks")):
        mine = [s for s in spans if s.network == network]
        lines = [phases.index(s.phase) for s in mine]
        starts = [s.start for s in mine]
        axes.barh(lines, [s.end - s.start for s in mine], left=starts, color=COLOURS[network], label=label)
    sums = [sum(s.end - s.start for s in spans if s.phase == phase) for phase in phases]
    axes.set_yticks(range(len(phases)), [f"{p}: {t:.2f} s" for p, t in zip(phases, sums, strict=True)])
    axes.invert_yaxis()
    axes.set_xlabel("seconds from the start of the scan")
    axes.legend(loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
