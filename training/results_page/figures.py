"""Figures of the page. They show numbers only, no image of a patient.

Colours are those of Okabe and Ito, which people with colour blindness can tell apart. Each model also has a marker of
its own, so that a print in grey is readable.
"""

import textwrap
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator
from PIL import Image

from training.cluster_bootstrap import Interval
from training.results_page.groups import HIGH, Haemorrhage, Healthy, Outlined, Phase

BLUE, ORANGE, GREEN, PINK, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C8C8C", "#000000"
STYLES = {"t1": (BLUE, "o"), "flair": (GREEN, "s"), "headct": (PINK, "^"), "ct": (ORANGE, "D")}
LINES = {"ct": "-", "headct": "--"}
RC: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 9.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.h_pad": 0.06,
}
WIDTH, DPI, ROW = 8.0, 130, 0.46
# Key of the PNG under which the hash of the drawn data is stored.
DATA_KEY = "Data"
# Volumes below this one are drawn on a linear scale.
LINEAR_ML = 0.1
TICKS_ML = (0, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
LABEL_WIDTH = 34
# With fewer scans, a median says nothing.
MIN_MEDIAN = 3
# Part of a row that its dots may cover, and the number of places for a dot in half of it.
SPREAD, PLACES = 0.38, 7


def swarm(positions: Sequence[float], width: float) -> list[float]:
    """Return an offset for each position, so that close positions do not cover each other.

    Parameters
    ----------
    positions : sequence of float
    width : float
        Positions that differ by less are close.

    Returns
    -------
    list of float
        The offset of least size, in [-SPREAD, SPREAD], that no close position has. The largest if all are taken.
    """
    steps = np.linspace(0, SPREAD, PLACES)
    candidates = [0.0, *(float(sign * step) for step in steps[1:] for sign in (1, -1))]
    offsets = [0.0] * len(positions)
    placed: list[tuple[float, float]] = []
    for i in np.argsort(positions, kind="stable"):
        taken = {offset for position, offset in placed if positions[i] - position < width}
        offsets[i] = next((each for each in candidates if each not in taken), candidates[-1])
        placed.append((positions[i], offsets[i]))
    return offsets


def data_digest(data: Any) -> str:
    """Return a hash of the data of a figure. It is stored in the figure, so that an old one is noticed."""
    return sha256(repr(data).encode()).hexdigest()[:16]


def stored_digest(path: Path) -> str:
    """Return the hash of the data that a figure was drawn from."""
    with Image.open(path) as image:
        return str(image.info[DATA_KEY])


def _save(figure: Figure, path: Path, data: Any) -> None:
    figure.savefig(path, dpi=DPI, metadata={DATA_KEY: data_digest(data), "Software": None})
    plt.close(figure)


def _label(title: str, scans: int) -> str:
    """Return the label of a row. Its number of scans stays on one line."""
    return f"{title}, n\u00a0=\u00a0{scans}"


def _rows(axis: Axes, labels: Sequence[str]) -> None:
    """Give each row its label, the first one at the top, and a light line."""
    axis.set_yticks(range(len(labels)), [textwrap.fill(label, LABEL_WIDTH) for label in labels])
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    for y in range(len(labels)):
        axis.axhline(y, color=GREY, alpha=0.25, linewidth=0.6, zorder=0)


def _volume_axis(axis: Axes, highest: float) -> None:
    axis.set_xscale("symlog", linthresh=LINEAR_ML, linscale=0.4)
    top = next((tick for tick in TICKS_ML if tick >= highest * 1.05), TICKS_ML[-1])
    axis.set_xlim(-0.025, max(top, 10))
    axis.set_xticks([tick for tick in TICKS_ML if tick <= max(top, 10)])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def _volume_position(ml: float) -> float:
    """Return a position that is even along the axis of volumes."""
    return float(np.sign(ml) * np.log10(1 + abs(ml) / LINEAR_ML))


def _dots(axis: Axes, y: float, values: Sequence[float], model: str, *, volume: bool) -> None:
    colour, marker = STYLES[model]
    positions = [_volume_position(value) if volume else value for value in values]
    offsets = swarm(positions, 0.06 if volume else 0.016)
    axis.plot(
        values, [y + offset for offset in offsets], marker, color=colour, markersize=4.6, alpha=0.85,
        markeredgecolor="white", markeredgewidth=0.4, linestyle="none", zorder=3,
    )  # fmt: skip


def _tick(axis: Axes, y: float, value: float) -> None:
    """Draw the median of a row."""
    axis.plot([value, value], [y - 0.45, y + 0.45], color=BLACK, linewidth=1.6, solid_capstyle="butt", zorder=4)


def _bar(axis: Axes, y: float, found: Interval, marker: str, colour: str, *, filled: bool = True) -> None:
    """Draw a value with its interval."""
    if np.isfinite(found.low):
        axis.plot([found.low, found.high], [y, y], color=colour, linewidth=1.6)
    face = colour if filled else "white"
    axis.plot([found.value], [y], marker, color=colour, markerfacecolor=face, markersize=6.5, markeredgewidth=1.4)


def _legend_dot(label: str, colour: str = GREY, marker: str = "o", **style: Any) -> Line2D:
    options: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 5.5} | style
    return Line2D([], [], label=label, **options)


def _legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    columns = len(handles) if len(handles) < 5 else (len(handles) + 1) // 2
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, handletextpad=0.5, borderpad=1.0)


def _median_handle() -> Line2D:
    return _legend_dot("median", BLACK, "|", markersize=11, markeredgewidth=2.0)


def _mark_refused(axis: Axes, counts: Sequence[int]) -> None:
    """Write at the right end of each row how many scans were refused."""
    for y, count in enumerate(counts):
        if count:
            axis.plot([axis.get_xlim()[1]], [y], "x", color=BLACK, markersize=6, clip_on=False)
            axis.annotate(
                f"{count}", (axis.get_xlim()[1], y), (-7, 0), textcoords="offset points", ha="right", va="center"
            )


def _refused_handle(groups: Sequence[Healthy]) -> list[Line2D]:
    refused = any(group.refused for group in groups)
    return [_legend_dot("number of refused scans", BLACK, "x")] if refused else []


def draw_home(
    path: Path, groups: Sequence[Healthy], inserted: dict[str, tuple[Interval, Interval]], aim: float
) -> None:
    """Draw false findings in healthy scans, and the Dice of inserted lesions.

    Parameters
    ----------
    path : Path
    groups : sequence of Healthy
    inserted : dict of str to (Interval, Interval)
        Median Dice of the bright and of the dark lesions by the source of the healthy scans.
    aim : float
        Largest median volume that `t1` should have, in ml.
    """
    with mpl.rc_context(RC):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(WIDTH, 1.5 + ROW * len(groups)), width_ratios=(1.7, 1), sharey=True, layout="constrained"
        )
        _rows(left, [_label(f"{group.model}: {group.source}", group.scans) for group in groups])
        for y, group in enumerate(groups):
            _dots(left, y, group.ml, group.model, volume=True)
            if group.ml:
                _tick(left, y, group.percentile(50).value)
            if group.model == "t1":
                left.plot([aim, aim], [y - 0.5, y + 0.5], "--", color=BLACK, linewidth=1.1)
            if group.source in inserted:
                for found, shift, filled in zip(inserted[group.source], (-0.14, 0.14), (False, True), strict=True):
                    _bar(right, y + shift, found, "o", STYLES[group.model][0], filled=filled)
        _rows(right, [_label(f"{group.model}: {group.source}", group.scans) for group in groups])
        right.tick_params(labelleft=False)
        _volume_axis(left, max((ml for group in groups for ml in group.ml), default=1.0))
        _mark_refused(left, [group.refused for group in groups])
        left.set_xlabel("false findings in a healthy scan, ml")
        right.set(xlim=(0, 1), xlabel="median Dice of inserted lesions", xticks=np.linspace(0, 1, 6))
        handles = [_legend_dot("one scan"), _median_handle()]
        handles += [Line2D([], [], label=f"aim for t1: median at most {aim:g} ml", color=BLACK, linestyle="--")]
        handles += [
            Line2D([], [], label=f"{name} lesions, 95 % interval", color=BLACK, marker="o", markerfacecolor=face)
            for name, face in (("bright", "white"), ("dark", BLACK))
        ]
        _legend(figure, handles + _refused_handle(groups))
        medians = {source: [round(each.value, 4) for each in found] for source, found in inserted.items()}
        _save(figure, path, (groups, medians, aim))


def draw_unseen(path: Path, groups: Sequence[Healthy], whole: Healthy, aims: tuple[float, float]) -> None:
    """Draw false findings in healthy heads by scanner.

    Parameters
    ----------
    path : Path
    groups : sequence of Healthy
    whole : Healthy
        All people together.
    aims : (float, float)
        Largest median and largest 90th percentile, in ml.
    """
    labels = [
        "median of all",
        f"{HIGH:.0f}th percentile of all",
        *(_label(group.source, group.scans) for group in groups),
    ]
    with mpl.rc_context(RC):
        figure, axis = plt.subplots(figsize=(WIDTH, 1.6 + 0.42 * len(labels)), layout="constrained")
        _rows(axis, labels)
        if whole.ml:
            for y, percent in enumerate((50.0, HIGH)):
                _bar(axis, y, whole.percentile(percent), "d", BLACK)
        for y, group in enumerate(groups, 2):
            _dots(axis, y, group.ml, group.model, volume=True)
            if len(group.ml) >= MIN_MEDIAN:
                _tick(axis, y, group.percentile(50).value)
        _volume_axis(axis, max((ml for group in groups for ml in group.ml), default=1.0))
        _mark_refused(axis, [0, 0, *(group.refused for group in groups)])
        for y, aim in enumerate(aims):
            axis.plot([aim, aim], [y - 0.45, y + 0.45], "--", color=BLACK, linewidth=1.1)
        axis.axhline(1.5, color=BLACK, linewidth=0.8)
        axis.set_xlabel("false findings in a healthy scan, ml")
        handles = [_legend_dot("one person", *STYLES[whole.model]), _median_handle()]
        handles += [Line2D([], [], label="value with 95 % interval", color=BLACK, marker="d", markersize=5.5)]
        handles += [Line2D([], [], label="aim: at most", color=BLACK, linestyle="--")]
        _legend(figure, handles + _refused_handle(groups))
        _save(figure, path, (groups, whole, aims))


def draw_real(path: Path, groups: Sequence[Outlined]) -> None:
    """Draw the Dice of each scan with outlined lesions."""
    with mpl.rc_context(RC):
        figure, axis = plt.subplots(figsize=(WIDTH, 1.3 + ROW * len(groups)), layout="constrained")
        _rows(axis, [_label(group.title, group.scans) for group in groups])
        for y, group in enumerate(groups):
            _dots(axis, y, group.dice, group.model, volume=False)
            if len(group.dice) >= MIN_MEDIAN:
                _tick(axis, y, float(np.median(group.dice)))
            if group.refused:
                offsets = swarm([0.0] * group.refused, 1.0)
                axis.plot([-0.03] * group.refused, [y + offset for offset in offsets], "x", color=BLACK, markersize=6)
        axis.set(xlim=(-0.05, 1), xlabel="Dice of a scan at the shipped threshold")
        axis.set_xticks(np.linspace(0, 1, 6))
        models = dict.fromkeys(group.model for group in groups)
        handles = [_legend_dot(f"one scan, {model}", *STYLES[model]) for model in models]
        handles += [_median_handle(), _legend_dot("refused: not analysed", BLACK, "x")]
        _legend(figure, handles)
        _save(figure, path, groups)


def draw_haemorrhage(path: Path, groups: Sequence[Haemorrhage], aim: float) -> None:
    """Draw the marked volume of each adult, and the ROC curves by slice.

    Parameters
    ----------
    path : Path
    groups : sequence of Haemorrhage
    aim : float
        Largest median volume without haemorrhage, in ml.
    """
    rows = [
        (group, name, ml) for group in groups for name, ml in (("with", group.affected), ("without", group.unaffected))
    ]
    with mpl.rc_context(RC):
        figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.6), width_ratios=(1.45, 1), layout="constrained")
        _rows(left, [_label(f"{group.model}, {name} haemorrhage", len(ml)) for group, name, ml in rows])
        for y, (group, name, ml) in enumerate(rows):
            _dots(left, y, ml, group.model, volume=True)
            if ml:
                _tick(left, y, float(np.median(ml)))
            if name == "without":
                left.plot([aim, aim], [y - 0.45, y + 0.45], "--", color=BLACK, linewidth=1.1)
        _volume_axis(left, max((value for _, _, ml in rows for value in ml), default=1.0))
        left.set_xlabel("marked volume in a patient, ml")
        for group in groups:
            _draw_roc(right, group)
        right.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1)
        ticks = np.linspace(0, 1, 6)
        right.set(xlim=(0, 1), ylim=(0, 1.01), xticks=ticks, yticks=ticks, aspect="equal")
        right.set(xlabel="marked share of the slices\nwithout haemorrhage")
        right.set(ylabel="marked share of the slices\nwith haemorrhage")
        right.legend(loc="lower right")
        handles = [_legend_dot(f"one adult, {group.model}", *STYLES[group.model]) for group in groups]
        handles.append(_median_handle())
        handles += [Line2D([], [], label=f"aim: median at most {aim:g} ml", color=BLACK, linestyle="--")]
        handles += [_legend_dot("any mark in the slice", BLACK, "*", markersize=9)]
        _legend(figure, handles)
        _save(figure, path, (groups, aim))


def _draw_roc(axis: Axes, group: Haemorrhage) -> None:
    colour = STYLES[group.model][0]
    auroc = group.summary["slice_auroc_volume"][0]
    axis.plot(*group.roc_curve(), LINES[group.model], color=colour, label=f"{group.model}: AUROC {auroc:.2f}")
    axis.plot(*([value] for value in group.slices_with_findings()), "*", color=colour, markersize=12, clip_on=False)


def draw_time(path: Path, found: Sequence[Phase]) -> None:
    """Draw the seconds of each phase of one scan."""
    with mpl.rc_context(RC):
        figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.27 * len(found)), layout="constrained")
        rows = range(len(found))
        axis.barh(rows, [p.network for p in found], color=BLUE, label="in the networks", height=0.7)
        axis.barh(
            rows, [p.other for p in found], left=[p.network for p in found], height=0.7,
            color="#9BD0F0", edgecolor=BLUE, linewidth=0.6, hatch="////", label="outside the networks",
        )  # fmt: skip
        for y, phase in enumerate(found):
            axis.text(phase.network + phase.other, y, f"  {phase.network + phase.other:.2f}", va="center", fontsize=8.5)
        axis.set_yticks(rows, [phase.name for phase in found])
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set_xlabel("seconds")
        axis.legend(loc="lower right")
        _save(figure, path, found)
