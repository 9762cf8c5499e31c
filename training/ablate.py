"""Choices of the detection, judged by synthetic lesions on healthy validation subjects.

`python -m training.ablate CONFIG` writes docs/evaluation/NAME-ablation.md. Validation shapes and
validation subjects only: what it shows may choose a configuration's [detection], and the test
subjects then judge that choice. All is measured on the slices of the model.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from app.manifest import View
from app.pipeline import anomaly
from app.pipeline.findings import dice, label_findings
from app.pipeline.models import Models
from app.pipeline.prepare import BoolArray
from app.volume import FloatArray, Volume
from training.calibrate import imagine_all, kl_threshold, latent_masks, residual_settings, smallest_component
from training.config import ROOT, Config
from training.data import load_volume, subject_path
from training.evaluate import best_dice
from training.examine import Examined, examine, graph_models, judged_map
from training.lesions import gold_shape, insert_lesion
from training.splits import load_split

SHAPES = ("patient11", "patient15", "patient22", "patient28", "patient09")
CONTRASTS = (0.35, -0.35)
# What is changed against the configuration, row by row; the KL map of the first rows is shared.
ROWS: dict[str, dict[str, Any]] = {
    "the configuration": {},
    "KL percentile 90": {"kl_percentile": 90.0},
    "mask grown by one latent": {"grow": 1},
    "80 % of healthy slices empty": {"empty_share": 0.8},
    "reverse from t = 500": {"reverse_timesteps": (500, 400, 300, 200, 100, 50)},
    "against the reconstruction": {"reference": "reconstruction"},
    "divided by local contrast": {"contrast_floor": 0.03},
    "weighted by KL": {"weighted_by_kl": True},
    "one threshold": {"extent_share": 1.0},
    "2 ml in healthy scans": {"false_positive_ml": 2.0},
    "edge judged too": {"erosion": 0},
    "smoothed by 1 mm": {"smoothing_mm": 1.0},
    "the plain view alone": {"views": (View(),)},
    "and a mirrored, shifted one": {"views": (View(), View(mirrored=True, shift=(1, 1)))},
}
# METHOD's plain rules after the paper: its noise levels, one threshold, no weighting.
PAPER: dict[str, Any] = {
    "kl_timesteps": (400, 450, 500, 550, 600),
    "kl_mean": "arithmetic",
    "kl_smoothing_mm": 0.0,
    "kl_percentile": 97.5,
    "reverse_timesteps": (500, 400, 300, 200, 100, 50),
    "contrast_floor": 0.0,
    "extent_share": 1.0,
    "smoothing_mm": 0.0,
    "erosion": 0,
    "views": (View(),),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A scan with a lesion, and its truth on its own grid."""

    contrast: float
    volume: Volume
    truth: BoolArray


@dataclass(frozen=True, eq=False)
class Examination:
    """Healthy scans and cases up to their KL maps, under one choice of the KL map."""

    healthy: list[Examined]
    sick: list[Examined]
    truths: list[BoolArray]

    @property
    def scans(self) -> list[Examined]:
        """Healthy ones first."""
        return self.healthy + self.sick


def make_cases(config: Config) -> list[Case]:
    """Each shape and contrast in one validation subject."""
    subjects = load_split(config.data.splits).validation
    cases = []
    for i, (shape, contrast) in enumerate(itertools.product(SHAPES, CONTRASTS)):
        volume = load_volume(subject_path(config, subjects[i % len(subjects)]))
        made = insert_lesion(volume, gold_shape(shape), contrast, i)
        cases.append(Case(contrast, made.volume, made.truth))
    return cases


def with_detection(config: Config, changed: dict[str, Any]) -> Config:
    """The configuration with some choices of the detection changed."""
    return config.model_copy(update={"detection": config.detection.model_copy(update=changed)})


def examine_all(name: str, config: Config, models: Models, cases: list[Case]) -> Examination:
    """KL maps of every healthy validation subject and every case."""
    subjects = load_split(config.data.splits).validation
    healthy = [
        examine(load_volume(subject_path(config, s)), models, config) for s in tqdm(subjects, desc=f"healthy, {name}")
    ]
    scans = [examine(case.volume, models, config) for case in tqdm(cases, desc=f"lesions, {name}")]
    truths = [
        scan.placement.from_source(case.truth.astype(np.float32))[scan.plain.seen.known] > 0.5
        for scan, case in zip(scans, cases, strict=True)
    ]
    return Examination(healthy, scans, truths)


# Masks and counterparts of one scan, of each view.
Views = tuple[list[BoolArray], list[FloatArray]]


class Imagined:
    """Masks and counterparts of an examination, computed once for each rule of the latent mask."""

    def __init__(self, data: Examination, models: Models) -> None:
        self.data = data
        self._models = models
        self._known: dict[str, list[Views]] = {}

    def __call__(self, config: Config) -> tuple[float, list[Views]]:
        """KL threshold, and masks and counterparts of every scan, healthy ones first."""
        d = config.detection
        threshold = kl_threshold(self.data.healthy, d.kl_percentile)
        component = smallest_component(self.data.healthy, threshold, d.empty_share)
        rule = repr((threshold, component, d.grow, d.reverse_timesteps, d.views))
        if rule not in self._known:
            masks = [latent_masks(s, threshold, component, config) for s in self.data.scans]
            self._known[rule] = [
                (m, imagine_all(s, m, self._models, config)) for s, m in zip(self.data.scans, masks, strict=True)
            ]
        return threshold, self._known[rule]


def measure(name: str, config: Config, imagined: Imagined, contrasts: npt.NDArray[np.float64]) -> str:
    """One row of the table."""
    data = imagined.data
    threshold, counterparts = imagined(config)
    maps = [judged_map(scan, m, c, threshold, config) for scan, (m, c) in zip(data.scans, counterparts, strict=True)]
    covered, empty = _masks(data, [m[0] for m, _ in counterparts])
    return _row(name, config, data, maps, contrasts, (covered, empty))


def intensity_row(config: Config, data: Examination, contrasts: npt.NDArray[np.float64]) -> str:
    """A threshold on the intensity of the slices, without any model: the opponent to beat on bright lesions."""
    maps = [
        np.where(anomaly.erode(s.foreground, config.detection.erosion), s.plain.seen.x[:, 0], np.float32(np.nan))
        for s in data.scans
    ]
    # One threshold: at a share of it, everything is as bright.
    plain = with_detection(config, {"extent_share": 1.0})
    return _row("no model: intensity threshold", plain, data, maps, contrasts, (1.0, 0.0))


def _masks(data: Examination, masks: list[BoolArray]) -> tuple[float, float]:
    """Share of the lesions under the latent masks, and of healthy slices without a mask."""
    healthy, sick = masks[: len(data.healthy)], masks[len(data.healthy) :]
    covered = [
        float(anomaly.upsample(m, t.shape[1:])[t].mean()) for m, s, t in zip(sick, data.sick, data.truths, strict=True)
    ]
    changed = np.concatenate([m.any(axis=(1, 2)) for m in healthy])
    return float(np.mean(covered)), float(1 - changed.mean())


def _row(
    name: str,
    config: Config,
    data: Examination,
    maps: list[FloatArray],
    contrasts: npt.NDArray[np.float64],
    masks: tuple[float, float],
) -> str:
    healthy, sick = maps[: len(data.healthy)], maps[len(data.healthy) :]
    settings, voxel_ml = residual_settings(healthy, config), config.preparation.voxel_ml
    found = [label_findings(m, settings, voxel_ml)[0] > 0 for m in sick]
    shipped = np.array([dice(f, t) for f, t in zip(found, data.truths, strict=True)])
    best = np.array([best_dice(m, t) for m, t in zip(sick, data.truths, strict=True)])
    numbers = [*masks]
    numbers += [f(v[contrasts == c]) for v, f in ((shipped, np.mean), (best, np.mean)) for c in CONTRASTS]
    return f"| {name} | " + " | ".join(f"{n:.2f}" for n in numbers) + " |"


def main(path: Path) -> None:
    """Measure every row and write the table."""
    config = Config.load(path)
    models = graph_models(config)
    cases = make_cases(config)
    contrasts = np.array([case.contrast for case in cases])
    own = Imagined(examine_all("configuration", config, models, cases), models)
    lines = [measure(name, with_detection(config, changed), own, contrasts) for name, changed in tqdm(ROWS.items())]
    lines.append(intensity_row(config, own.data, contrasts))
    as_paper = with_detection(config, PAPER)
    paper = Imagined(examine_all("paper", as_paper, models, cases), models)
    lines.append(measure("the paper's KL map and plain rules", as_paper, paper, contrasts))
    write(config, lines)


def write(config: Config, rows: list[str]) -> None:
    """The page of the ablation."""
    d = config.detection
    heads = ["changed", "lesion in the latent mask", "healthy slices empty"]
    heads += [f"Dice, c = {c:+.2f}" for c in CONTRASTS] + [f"best Dice, c = {c:+.2f}" for c in CONTRASTS]
    text = f"""# Ablation of {config.name}-{config.version}

Written by `python -m training.ablate`, on healthy validation subjects with lesions of {len(SHAPES)} validation shapes
at each contrast, on the slices of the model. Each row changes one choice of the configuration, and is calibrated anew:
at the threshold, the median healthy validation scan shows {d.false_positive_ml:g} ml. "Best" takes the threshold that
suits each scan, without hysteresis. Means over scans.

| {" | ".join(heads)} |
{"| --- " * len(heads)}|
"""
    target = ROOT / "docs" / "evaluation" / f"{config.name}-ablation.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
