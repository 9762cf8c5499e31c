"""A dozen slices at a glance, of data that may be shown; and what evaluations of the network buy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt

from app.manifest import Manifest
from app.pipeline.detect import detect
from app.pipeline.findings import label_findings
from app.pipeline.networks import Networks
from app.volume import BoolArray, FloatArray
from training.config import Config
from training.experiments.cases import Case, synthetic
from training.experiments.methods import ungated

# Of each bundle so many, in the order of its test subjects and the kinds in turns: none was picked by its result.
SHOWN = {"t1": 8, "headct": 4}
KINDS = ("grade 3", "grade 2")
TITLES = ("image", "healthy counterpart", "anomaly map", "mask", "truth")
OURS, TRUE = (1.0, 0.45, 0.1), (0.2, 0.85, 0.3)


@dataclass(frozen=True, eq=False)
class Panel:
    """One slice of one case; rows run from posterior to anterior."""

    label: str
    image: FloatArray
    counterpart: FloatArray
    anomaly: FloatArray
    mask: BoolArray
    truth: BoolArray
    top: float


def panels(config: Config, models: Networks, manifest: Manifest) -> list[Panel]:
    """The slice with most of the lesion, of the first test subjects."""
    every = list(synthetic(config, manifest, "test"))
    by_kind = [[c for c in every if c.kind == kind] for kind in KINDS]
    count = SHOWN[config.name]
    chosen = [by_kind[i % len(KINDS)][i // len(KINDS)] for i in range(count)]
    return [_panel(case, models, manifest) for case in chosen]


def _panel(case: Case, models: Networks, manifest: Manifest) -> Panel:
    found = detect(case.volume, models, ungated(manifest))
    index = int(case.truth.sum(axis=(1, 2)).argmax())
    labels, _ = label_findings(found.anomaly[case.known], manifest.residual, manifest.preprocessing.voxel_ml)
    at = case.known[index]
    return Panel(
        f"{manifest.id}\n{case.subject}\n{case.kind}",
        found.slices.x[at, 0],
        found.counterpart[at],
        np.nan_to_num(found.anomaly[at]),
        labels[index] > 0,
        case.truth[index],
        2.5 * manifest.residual.threshold,
    )


def draw(shown: list[Panel], path: Path) -> None:
    """Two columns of cases, five pictures each."""
    half = (len(shown) + 1) // 2
    figure, axes = plt.subplots(half, 2 * len(TITLES), figsize=(15, 1.75 * half), layout="constrained")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for i, panel in enumerate(shown):
        column, row = divmod(i, half)
        line = axes[row, column * len(TITLES) : (column + 1) * len(TITLES)]
        _draw_line(line, panel)
        if not row:
            for axis, title in zip(line, TITLES, strict=True):
                axis.set_title(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_line(line: Any, panel: Panel) -> None:
    # Neurological order, as stored: the patient's left is on the right.
    for axis, image in zip(line, (panel.image, panel.counterpart), strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, origin="lower")
    line[2].imshow(panel.anomaly, cmap="inferno", vmin=0, vmax=panel.top, origin="lower")
    for axis, mask, colour in ((line[3], panel.mask, OURS), (line[4], panel.truth, TRUE)):
        painted = np.repeat(panel.image[..., None], 3, axis=2)
        painted[mask] = 0.35 * painted[mask] + 0.65 * np.array(colour)
        axis.imshow(painted, origin="lower")
    line[0].set_ylabel(panel.label, fontsize="x-small")


def draw_curve(document: dict[str, Any], path: Path) -> None:
    """Dice and AUPRC over evaluations a slice, a panel for each bundle; a ring around what it does."""
    bundles = document["bundles"]
    figure, axes = plt.subplots(1, len(bundles), figsize=(5 * len(bundles), 4), layout="constrained", squeeze=False)
    for axis, told in zip(axes[0], bundles.values(), strict=True):
        points = sorted(told["points"].items(), key=lambda each: each[1]["evaluations_per_slice"])
        at = [row["evaluations_per_slice"] for _, row in points]
        for colour, key, title in (("C0", "dice", "best-achievable Dice"), ("C1", "auprc", "AUPRC")):
            values = np.array([row[key]["value"] for _, row in points])
            axis.scatter(at, values, color=colour, s=18, label=title)
            # The best that so many evaluations have reached.
            axis.step(at, np.maximum.accumulate(values), where="post", color=colour, linewidth=1)
            own = told["points"][told["shipped"]]
            axis.scatter(own["evaluations_per_slice"], own[key]["value"], s=110, facecolors="none", edgecolors="k")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel="network evaluations a slice", title=told["provenance"]["bundle"], ylim=(0, 1))
    axes[0, 0].legend(loc="lower right", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
