"""Choices of the detection, judged by synthetic lesions on healthy validation subjects.

`python -m training.ablate CONFIG` writes docs/evaluation/NAME-ablation.md. Validation shapes and
validation subjects only: what it shows may choose a configuration's [detection], and the test
subjects then judge that choice. All is measured on the slices of the model.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from app.pipeline.detect import smooth
from app.pipeline.findings import dice
from app.pipeline.models import Models
from app.pipeline.prepare import BoolArray
from app.volume import FloatArray
from training.calibrate import examined_subjects, kl_threshold, latent_mask, smallest_component
from training.config import ROOT, Config
from training.data import load_volume, subject_path
from training.evaluate import best_dice
from training.examine import Examined, examine, graph_models, residual_map
from training.lesions import gold_shape, insert_lesion
from training.splits import load_split

SHAPES = ("patient11", "patient15", "patient22", "patient28", "patient09")
CONTRASTS = (0.35, -0.35, 0.2, -0.2)
PERCENTILES = (90.0, 95.0, 97.5)
GROW = (0, 1)
REFERENCES = ("image", "reconstruction")
SMOOTHING_MM = (0.0, 1.5, 2.5)


@dataclass(frozen=True, eq=False)
class Case:
    """An examined scan with a lesion, and its truth on the slices."""

    contrast: float
    scan: Examined
    truth: BoolArray


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    percentile: float
    component: int
    grow: int
    reference: str
    smoothing_mm: float


def make_cases(config: Config, models: Models) -> list[Case]:
    """Each shape and contrast in one validation subject."""
    subjects = load_split(config.data.splits).validation
    cases = []
    pairs = list(itertools.product(SHAPES, CONTRASTS))
    for i, (shape, contrast) in enumerate(tqdm(pairs, desc="lesions", unit="scan")):
        volume = load_volume(subject_path(config, subjects[i % len(subjects)]))
        made = insert_lesion(volume, gold_shape(shape), contrast, i)
        scan = examine(made.volume, models, config, config.detection.kl_timesteps)
        cases.append(Case(contrast, scan, _truth_on_slices(made.truth, scan)))
    return cases


def _truth_on_slices(truth: BoolArray, scan: Examined) -> BoolArray:
    stack = scan.placement.from_source(truth.astype(np.float32))
    on_slices: BoolArray = stack[scan.known] > 0.5
    return on_slices


def measure(
    healthy: list[Examined], cases: list[Case], models: Models, config: Config, rule: tuple[float, int, int]
) -> list[tuple[Setting, list[float]]]:
    """Every residual setting under one rule of the latent mask (percentile, component, grow)."""
    percentile, component, grow = rule
    threshold = kl_threshold(healthy, percentile)

    def maps(scan: Examined) -> dict[str, FloatArray]:
        mask = latent_mask(scan, threshold, component, grow)
        return residual_map(scan, mask, models, config, config.detection.reverse_timesteps)

    of_healthy = [maps(s) for s in healthy]
    of_cases = [maps(c.scan) for c in cases]
    spacing = config.preparation.spacing_mm
    rows = []
    for reference, sigma in itertools.product(REFERENCES, SMOOTHING_MM):
        values = [smooth(m[reference], s.foreground, sigma, spacing) for m, s in zip(of_healthy, healthy, strict=True)]
        pooled = np.concatenate([v[s.foreground] for v, s in zip(values, healthy, strict=True)])
        cut = max(
            float(np.quantile(pooled, 1 - config.detection.false_positive_rate)), config.detection.least_threshold
        )
        shipped: dict[float, list[float]] = {}
        best: list[float] = []
        for case, m in zip(cases, of_cases, strict=True):
            anomaly = smooth(m[reference], case.scan.foreground, sigma, spacing)
            shipped.setdefault(case.contrast, []).append(dice(anomaly > cut, case.truth))
            best.append(best_dice(anomaly, case.truth))
        rows.append(
            (
                Setting(percentile, component, grow, reference, sigma),
                [cut, *(float(np.mean(shipped[c])) for c in CONTRASTS), float(np.mean(best))],
            )
        )
    return rows


def main(path: Path) -> None:
    """Measure every combination and write the table."""
    config = Config.load(path)
    models = graph_models(config)
    healthy = examined_subjects(config, models, load_split(config.data.splits).validation)
    cases = make_cases(config, models)
    rows = []
    for percentile, grow in tqdm(list(itertools.product(PERCENTILES, GROW)), desc="rules", unit="rule"):
        k = smallest_component(healthy, kl_threshold(healthy, percentile), config.detection.empty_share)
        rows += measure(healthy, cases, models, config, (percentile, k, grow))
    rows += measure(healthy, cases, models, config, (97.5, 1, 0))  # METHOD's plain rule
    about = (
        "Written by `python -m training.ablate`: mean Dice on the slices of healthy validation subjects with lesions "
        f"of {len(SHAPES)} validation shapes; the residual threshold leaves "
        f"{config.detection.false_positive_rate:.2%} of healthy validation pixels above it. "
        "The rows with a component of 1 are the plain rule."
    )
    lines = [
        f"# Ablation of {config.name}-{config.version}",
        "",
        about,
        "",
        "| KL percentile | component | grow | reference | smoothing, mm | threshold | "
        + " | ".join(f"c = {c:+.2f}" for c in CONTRASTS)
        + " | best threshold a scan |",
        "| --- " * (7 + len(CONTRASTS)) + "|",
    ]
    for s, numbers in rows:
        cells = [f"{s.percentile:g}", str(s.component), str(s.grow), s.reference, f"{s.smoothing_mm:g}"]
        lines.append("| " + " | ".join(cells + [f"{n:.3f}" for n in numbers]) + " |")
    target = ROOT / "docs" / "evaluation" / f"{config.name}-ablation.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
