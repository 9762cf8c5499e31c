"""Dice and AUPRC against network evaluations per slice, on validation subjects with synthetic lesions."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from app.manifest import Manifest
from app.pipeline.diffusion import Networks
from app.volume import FloatArray, IntArray
from training.experiments import results_cache
from training.experiments.ablation import KlCalibration
from training.experiments.cases import Case, synthetic
from training.experiments.experiment import Experiment
from training.experiments.manifests import changed
from training.experiments.metrics import average_precision, best_dice, bootstrap_interval
from training.experiments.results import ByBundle, CurveScores, PointScores
from training.experiments.segmentation import count_scores, counterpart_map

PART = "accuracy_vs_evaluations"
# Cases by bundle, half of each grade.
CASES = {"t1": 4, "headct": 8}
GRADES = ("grade 2", "grade 3")


@dataclass(frozen=True)
class Point:
    """Detection setting: views (the bundle's first ones), noise levels of the KL map, reverse steps."""

    views: int
    kl: tuple[int, ...]
    reverse: tuple[int, ...]

    @property
    def label(self) -> str:
        """Key of its scores."""
        levels, steps = (", ".join(map(str, each)) for each in (self.kl, self.reverse))
        return f"{self.views} view(s), KL at t = {levels}, reverse from t = {steps}"


ONE, TWO = (20,), (50, 20)
EIGHT = (200, 160, 125, 95, 70, 50, 35, 20)
POINTS = (
    Point(1, (10,), ONE),
    Point(1, (10,), TWO),
    Point(1, (10,), EIGHT),
    Point(1, (5,), ONE),
    Point(1, (3,), ONE),
    Point(1, (3, 5, 10), ONE),
    Point(2, (5,), ONE),
    Point(4, (5,), ONE),
    Point(4, (3,), ONE),
    Point(4, (10,), TWO),
)


class CountingNetworks:
    """Networks that count the slices that the denoiser evaluates."""

    def __init__(self, models: Networks) -> None:
        self.evaluations = 0
        self._denoise = models.denoise
        self.networks = replace(models, denoise=self._count)

    def _count(self, z_t: FloatArray, t: IntArray) -> FloatArray:
        self.evaluations += len(z_t)
        return self._denoise(z_t, t)


def shipped_point(manifest: Manifest) -> Point:
    """Return the setting of the bundle."""
    return Point(len(manifest.views), manifest.kl.timesteps, manifest.reverse.timesteps)


def apply_point(manifest: Manifest, point: Point, calibration: KlCalibration) -> Manifest:
    """Return the manifest with another setting, and the KL threshold that belongs to its noise levels."""
    kl = manifest.kl if point.kl == manifest.kl.timesteps else calibration.change(timesteps=point.kl)
    reverse = changed(manifest.reverse, timesteps=point.reverse)
    return changed(manifest, views=manifest.views[: point.views], kl=kl, reverse=reverse)


def choose_cases(every: Iterable[Case], count: int) -> list[Case]:
    """Return `count` cases, half of each grade, spread over the subjects."""
    found = list(every)
    chosen = []
    for offset, kind in enumerate(GRADES):
        mine = [c for c in found if c.kind == kind]
        # The second grade starts at the next subject, so that bright and dark lesions alternate.
        at = np.linspace(0, len(mine) - 1, count // len(GRADES)).round().astype(int)
        chosen += [mine[(i + offset) % len(mine)] for i in np.unique(at)]
    return chosen


def measure(models: Networks, manifest: Manifest, cases: list[Case], point: Point, code: str) -> PointScores:
    """Return the scores and the cost of one setting, both grades together."""
    counting = CountingNetworks(models)
    compute = counterpart_map(counting.networks, manifest)
    start = time.perf_counter()
    maps = [compute(case) for case in cases]
    seconds = time.perf_counter() - start
    slices = sum(len(case.slice_indices) for case in cases)
    counts = count_scores(maps, cases)
    return PointScores(
        views=point.views,
        kl=point.kl,
        reverse=point.reverse,
        evaluations_per_slice=counting.evaluations / slices,
        seconds_per_slice=seconds / slices,
        kl_threshold=manifest.kl.threshold,
        dice=bootstrap_interval(counts, best_dice),
        auprc=bootstrap_interval(counts, average_precision),
        cases=len(cases),
        code=code,
    )


def run() -> None:
    """Measure the settings that are missing, by bundle."""
    stored = results_cache.load(PART, ByBundle[CurveScores])
    bundles = dict(stored.bundles) if stored else {}
    for name, count in CASES.items():
        experiment = Experiment(name)
        config, manifest, models = experiment.config, experiment.manifest, experiment.float32_networks
        now, own = experiment.provenance("validation"), shipped_point(manifest)
        is_valid = name in bundles and results_cache.is_valid(bundles[name].provenance, now)
        points = dict(bundles[name].points) if is_valid else {}
        # The setting of the bundle is first, because the page compares the others with it.
        wanted = [point for point in dict.fromkeys((own, *POINTS)) if point.label not in points]
        if not wanted:
            continue
        calibration = KlCalibration(manifest.kl, config, models)
        cases = choose_cases(synthetic(config, manifest, "validation"), count)
        for point in tqdm(wanted, desc=name, unit="point"):
            at = apply_point(manifest, point, calibration)
            points[point.label] = measure(models, at, cases, point, now.code)
            bundles[name] = CurveScores(provenance=now, shipped=own.label, points=points)
            results_cache.save(PART, ByBundle[CurveScores](bundles=bundles))
