"""Ablation: scores of a bundle with one setting changed, on validation subjects with synthetic lesions.

The settings of a bundle are chosen with these cases, and the choice is evaluated on the test subjects. For `flair`, the
tumours of validation patients are measured too, but they are not used for any choice.
"""

import time
from collections.abc import Callable, Iterable
from functools import cache
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from app.manifest import KlMap, Manifest, View
from app.pipeline.diffusion import Networks
from app.volume import FloatArray
from training.calibrate import kl_threshold, residual_settings, round_significant, separate_slices
from training.config import Config
from training.data import load_scan, load_split
from training.experiments import results_cache
from training.experiments.baselines import CONTRAST_FLOOR
from training.experiments.cases import Case, balanced, make_case, synthetic, tumours
from training.experiments.experiment import Experiment
from training.experiments.manifests import changed
from training.experiments.metrics import ScoreCounts, average_precision, best_dice, bootstrap_interval, mean_interval
from training.experiments.results import AblationScores, ChangeScores, RunProvenance, ThresholdScores
from training.experiments.results_cache import gain_of
from training.experiments.segmentation import count_scores, counterpart_map, mask_map, shipped_dice
from training.features import ScanFeatures, extract_features

PART = "ablation"
# Cases of each grade, by bundle.
CASES = {"t1": 4, "headct": 8, "flair": 6}
AS_SHIPPED = "as shipped"
# Gains are computed over these grades together.
POOLED = ("grade 2", "grade 3")
PERCENTILES = (80.0, 90.0, 95.0, 97.5)
MEDIANS = {"no median": 1, "median of 3 pixels": 3, "median of 5 pixels": 5}
GROWN = {"latent mask not grown": 0, "latent mask grown by one": 1, "latent mask grown by two": 2}
PAPER_LEVELS, PAPER_STEPS, PAPER_PERCENTILE = (400, 450, 500, 550, 600), (500, 400, 300, 200, 100, 50), 97.5
# Rules that make the thresholds: millilitres in the median healthy scan, and share of the threshold for the extent.
FALSE_POSITIVE_ML = (0.5, 1.0, 2.0)
EXTENT_SHARES = (1.0, 0.8, 0.6, 0.4)


class KlCalibration:
    """KL maps with other settings, each with the threshold that healthy validation scans give it."""

    def __init__(self, kl: KlMap, config: Config, models: Networks) -> None:
        self.kl, self._config, self._models = kl, config, models
        self._examine = cache(self._examine_healthy)

    def _examine_healthy(self, timesteps: tuple[int, ...], smoothing_mm: float) -> list[ScanFeatures]:
        detection = changed(
            self._config.detection, kl_timesteps=timesteps, kl_smoothing_mm=smoothing_mm, views=(View(),)
        )
        config = changed(self._config, detection=detection)
        subjects = load_split(config.data.splits).validation
        return [
            extract_features(load_scan(config, s), self._models, config) for s in tqdm(subjects, desc="KL", leave=False)
        ]

    def change(self, **changes: Any) -> KlMap:
        """Return the KL map changed, with its threshold from the percentile of healthy latents."""
        kl = changed(self.kl, **changes)
        if {"timesteps", "smoothing_mm", "percentile"} & changes.keys():
            healthy = self._examine(kl.timesteps, kl.smoothing_mm)
            kl = changed(kl, threshold=round_significant(kl_threshold(healthy, kl.percentile)))
        return kl


def make_changes(own: Manifest, config: Config, models: Networks) -> dict[str, Manifest]:
    """Return manifests with one setting changed each, the shipped one first."""
    kl = KlCalibration(own.kl, config, models)
    residual = own.residual
    without_contrast, without_intensity = residual.contrast_floor > 0, residual.weighted_by_intensity
    masks = {
        **{f"KL percentile {p:g}": kl.change(percentile=p) for p in PERCENTILES if p != own.kl.percentile},
        **{name: kl.change(grow=grow) for name, grow in GROWN.items() if grow != own.kl.grow},
        "no latent mask: everything is inpainted": kl.change(threshold=-1.0),
        "KL map not smoothed": kl.change(smoothing_mm=0.0),
    }
    residuals = {
        f"{'not ' if without_contrast else ''}divided by local contrast": changed(
            residual, contrast_floor=0.0 if without_contrast else CONTRAST_FLOOR
        ),
        f"{'not ' if without_intensity else ''}multiplied by the intensity": changed(
            residual, weighted_by_intensity=not without_intensity
        ),
        **{
            name: changed(residual, median_pixels=pixels)
            for name, pixels in MEDIANS.items()
            if pixels != residual.median_pixels
        },
    }
    paper = changed(
        own,
        views=(View(),),
        kl=kl.change(timesteps=PAPER_LEVELS, smoothing_mm=0.0, percentile=PAPER_PERCENTILE, grow=0),
        reverse=changed(own.reverse, timesteps=PAPER_STEPS),
        residual=changed(residual, contrast_floor=0.0, weighted_by_intensity=False, median_pixels=1),
    )
    return {
        AS_SHIPPED: own,
        **{name: changed(own, kl=each) for name, each in masks.items()},
        **{name: changed(own, residual=each) for name, each in residuals.items()},
        "one view": changed(own, views=own.views[:1]),
        "four noise draws of one view": changed(own, views=own.views[:1] * 4),
        "the paper's noise levels, steps and residual": paper,
    }


class MemoisedNetworks:
    """Networks that run once for the same arrays: most changes need the same evaluations."""

    def __init__(self, models: Networks) -> None:
        self._results: dict[tuple[str, ...], FloatArray] = {}
        self._wrapped = models
        self.networks = Networks(
            encode=lambda x: self._run("encode", x),
            denoise=lambda z_t, t: self._run("denoise", z_t, t),
            decode=lambda z0: self._run("decode", z0),
        )

    def _run(self, network: str, *arrays: npt.NDArray[Any]) -> FloatArray:
        key = (network, *(f"{a.shape} {sha256(a.tobytes()).hexdigest()}" for a in arrays))
        if key not in self._results:
            self._results[key] = getattr(self._wrapped, network)(*arrays)
        return self._results[key].copy()

    def clear(self) -> None:
        """Forget all results."""
        self._results.clear()


def measure(
    cases: list[Case], manifests: dict[str, Manifest], models: Networks
) -> tuple[dict[str, dict[str, ChangeScores]], list[FloatArray]]:
    """Return the scores of every change by kind of case, and the maps of the shipped settings."""
    memoised = MemoisedNetworks(models)
    maps: dict[str, list[FloatArray]] = {name: [] for name in manifests}
    for case in tqdm(cases, desc="ablation", unit="scan"):
        memoised.clear()
        for name, manifest in manifests.items():
            maps[name].append(counterpart_map(memoised.networks, manifest)(case))
    kinds = {kind: [i for i, c in enumerate(cases) if c.kind == kind] for kind in dict.fromkeys(c.kind for c in cases)}
    kinds[" and ".join(POOLED)] = [i for i, case in enumerate(cases) if case.kind in POOLED]
    scores = {}
    for kind, mine in kinds.items():
        counts = {name: count_scores([each[i] for i in mine], [cases[i] for i in mine]) for name, each in maps.items()}
        scores[kind] = {name: _score_change(name, own, counts[AS_SHIPPED]) for name, own in counts.items()}
    return scores, maps[AS_SHIPPED]


def _score_change(name: str, counts: ScoreCounts, shipped: ScoreCounts) -> ChangeScores:
    return ChangeScores(
        auprc=bootstrap_interval(counts, average_precision),
        dice=bootstrap_interval(counts, best_dice),
        cases=len(counts.positive),
        gain=None if name == AS_SHIPPED else gain_of(counts, shipped),
    )


def load_healthy(config: Config, manifest: Manifest) -> Iterable[Case]:
    """Yield healthy validation scans as cases without a lesion."""
    for subject in load_split(config.data.splits).validation:
        scan = load_scan(config, subject)
        nothing = np.zeros(scan.volume.shape, np.bool_)
        case = make_case(subject, "healthy", scan.volume, nothing, manifest, scan.healthy_slices)
        if len(case.slice_indices):
            yield case


def measure_thresholds(
    experiment: Experiment, healthy: list[FloatArray], cases: list[Case], maps: list[FloatArray]
) -> tuple[ThresholdScores, ...]:
    """Return mean Dice of the mask for each rule that makes the thresholds from healthy maps.

    Parameters
    ----------
    healthy, maps : list of (M, H, W) ndarray
        Shipped anomaly maps of healthy validation scans and of the cases.
    """
    config, manifest = experiment.config, experiment.manifest
    own, rows = manifest.residual, []
    if config.data.image_archive is not None:
        healthy = [separate_slices(each) for each in healthy]
    shipped = (config.detection.false_positive_ml, config.detection.extent_share)
    for ml in FALSE_POSITIVE_ML:
        for share in EXTENT_SHARES:
            detection = changed(config.detection, false_positive_ml=ml, extent_share=share)
            found = residual_settings(healthy, changed(config, detection=detection))
            residual = changed(own, threshold=found.threshold, extent_threshold=found.extent_threshold)
            at = changed(manifest, residual=residual)
            dices: dict[str, list[float]] = {}
            for values, case in zip(maps, cases, strict=True):
                dices.setdefault(case.kind, []).append(shipped_dice(values, case, at))
            rows.append(
                ThresholdScores(
                    false_positive_ml=ml,
                    extent_share=share,
                    threshold=residual.threshold,
                    dice={kind: mean_interval(each) for kind, each in dices.items()},
                    shipped=(ml, share) == shipped,
                )
            )
    return tuple(rows)


def run() -> None:
    """Measure the bundles whose stored ablation is not valid. Each has its own document."""
    for name, count in CASES.items():
        part, experiment = f"{PART}-{name}", Experiment(name)
        config, manifest, models = experiment.config, experiment.manifest, experiment.float32_networks
        now, stored = experiment.provenance("validation"), results_cache.load(part, AblationScores)
        if stored is not None and results_cache.is_valid(stored.provenance, now):
            continue
        start = time.perf_counter()
        cases = balanced(synthetic(config, manifest, "validation"), count)
        if config.data.image_archive is not None and config.data.image_archive.kind == "lgg":
            cases += [case for case in tumours(config, manifest, "validation") if case.truth.any()]
        kinds, maps = measure(cases, make_changes(manifest, config, models), models)
        compute: Callable[[Case], FloatArray] = counterpart_map(models, manifest)
        healthy = [mask_map(compute(c), c) for c in tqdm(load_healthy(config, manifest), desc="healthy")]
        thresholds = measure_thresholds(experiment, healthy, cases, maps)
        provenance = RunProvenance(**now.model_dump(), total_seconds=time.perf_counter() - start)
        results_cache.save(part, AblationScores(provenance=provenance, kinds=kinds, thresholds=thresholds))
