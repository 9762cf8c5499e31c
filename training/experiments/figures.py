"""The three figures of docs/RESULTS.md. Data in them may be shown publicly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from app.manifest import Manifest
from app.pipeline.diffusion import Networks
from app.pipeline.findings import label_findings
from app.pipeline.methods import METHODS
from app.volume import BoolArray, FloatArray
from training.config import ROOT, Config
from training.experiments.cases import Case, synthetic
from training.experiments.manifests import without_ood_check
from training.experiments.results import ByBundle, CurveScores, Reliability

FIGURES = ROOT / "docs" / "figures"
EXAMPLES, CURVE, RELIABILITY = (FIGURES / f"{name}.png" for name in ("results", "evaluations", "reliability"))
# Examples of each bundle: the first test subjects, both grades in turn, so that none is picked by its result.
SHOWN = {"t1": 8, "headct": 4}
GRADES = ("grade 3", "grade 2")
TITLES = ("image", "healthy counterpart", "anomaly map", "mask", "truth")
MASK_COLOUR, TRUTH_COLOUR = (1.0, 0.45, 0.1), (0.2, 0.85, 0.3)


@dataclass(frozen=True, eq=False)
class Example:
    """One slice of one case. Rows of its arrays run from posterior to anterior."""

    label: str
    image: FloatArray
    counterpart: FloatArray
    anomaly: FloatArray
    mask: BoolArray
    truth: BoolArray
    top: float


def make_examples(config: Config, models: Networks, manifest: Manifest) -> list[Example]:
    """Return the slice with most of the lesion of the first test subjects."""
    every = list(synthetic(config, manifest, "test"))
    by_grade = [[c for c in every if c.kind == grade] for grade in GRADES]
    return [
        _make_example(by_grade[i % len(GRADES)][i // len(GRADES)], models, manifest) for i in range(SHOWN[config.name])
    ]


def _make_example(case: Case, models: Networks, manifest: Manifest) -> Example:
    found = METHODS[manifest.method](case.volume, models, without_ood_check(manifest))
    index = int(case.truth.sum(axis=(1, 2)).argmax())
    labels, _ = label_findings(found.anomaly[case.slice_indices], manifest.residual, manifest.preprocessing.voxel_ml)
    at = case.slice_indices[index]
    return Example(
        f"{manifest.id}\n{case.subject}\n{case.kind}",
        found.slices.x[at, 0],
        found.counterpart[at],
        np.nan_to_num(found.anomaly[at]),
        labels[index] > 0,
        case.truth[index],
        2.5 * manifest.residual.threshold,
    )


def draw_examples(examples: list[Example]) -> None:
    """Draw two columns of cases, five images each."""
    half = (len(examples) + 1) // 2
    figure, axes = plt.subplots(half, 2 * len(TITLES), figsize=(15, 1.75 * half), layout="constrained")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for i, example in enumerate(examples):
        column, row = divmod(i, half)
        line = axes[row, column * len(TITLES) : (column + 1) * len(TITLES)]
        _draw_example(line, example)
        if not row:
            for axis, title in zip(line, TITLES, strict=True):
                axis.set_title(title, fontsize="medium")
    _save(figure, EXAMPLES)


def _draw_example(line: Any, example: Example) -> None:
    # Neurological order, as stored: the patient's left is on the right.
    for axis, image in zip(line, (example.image, example.counterpart), strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, origin="lower")
    line[2].imshow(example.anomaly, cmap="inferno", vmin=0, vmax=example.top, origin="lower")
    for axis, mask, colour in ((line[3], example.mask, MASK_COLOUR), (line[4], example.truth, TRUTH_COLOUR)):
        painted = np.repeat(example.image[..., None], 3, axis=2)
        painted[mask] = 0.35 * painted[mask] + 0.65 * np.array(colour)
        axis.imshow(painted, origin="lower")
    line[0].set_ylabel(example.label, fontsize="x-small")


def draw_curve(document: ByBundle[CurveScores]) -> None:
    """Draw Dice and AUPRC over evaluations per slice, a panel for each bundle, its own setting ringed."""
    figure, axes = plt.subplots(
        1, len(document.bundles), figsize=(5 * len(document.bundles), 4), layout="constrained", squeeze=False
    )
    for axis, curve in zip(axes[0], document.bundles.values(), strict=True):
        points = sorted(curve.points.values(), key=lambda point: point.evaluations_per_slice)
        own = curve.points[curve.shipped]
        at = [point.evaluations_per_slice for point in points]
        for colour, key, title in (("C0", "dice", "best-achievable Dice"), ("C1", "auprc", "AUPRC")):
            values = np.array([getattr(point, key).value for point in points])
            axis.scatter(at, values, color=colour, s=18, label=title)
            # The line is the best that is reached with so many evaluations.
            axis.step(at, np.maximum.accumulate(values), where="post", color=colour, linewidth=1)
            own_value = getattr(own, key).value
            axis.scatter(own.evaluations_per_slice, own_value, s=110, facecolors="none", edgecolors="k")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(xlabel="network evaluations per slice", title=curve.provenance.bundle, ylim=(0, 1))
    axes[0, 0].legend(loc="lower right", fontsize="small")
    _save(figure, CURVE)


def draw_reliability(reliability: Reliability) -> None:
    """Draw the observed over the predicted share, one panel for each kind of image."""
    kinds = reliability.kinds
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 4), layout="constrained", squeeze=False)
    for axis, (kind, row) in zip(axes[0], kinds.items(), strict=True):
        predicted = np.array([b.predicted for b in row.bins])
        value, low, high = np.array([(b.observed.value, b.observed.low, b.observed.high) for b in row.bins]).T
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        # A percentile interval may lie on one side of the value.
        reach = np.maximum(np.stack([value - low, high - value]), 0)
        axis.errorbar(predicted, value, yerr=reach, fmt="o", color="C0", markersize=4, capsize=2)
        axis.set(xlabel="predicted share that is not healthy", ylabel="observed share", title=f"healthy and {kind}")
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    _save(figure, RELIABILITY)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
