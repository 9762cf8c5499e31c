"""Oracle ablation: upper bounds with known truth, to show which step loses a lesion: mask, counterpart or VQ-VAE.

Cases are synthetic lesions in healthy slices of validation subjects, so that the truth and the healthy slice are known.
Each step gets more of the truth than the one before.
"""

import time

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from app.manifest import Manifest, View
from app.pipeline import diffusion
from app.pipeline.detect import compare_view
from app.pipeline.diffusion import EncodedView, KeyedNoise, Networks, Schedule, encode_view
from app.pipeline.preprocess import to_slices
from app.pipeline.scores import (
    IN_PLANE,
    augment,
    average_views,
    erode_foreground,
    local_contrast,
    masked_residual,
    postprocess_residual,
    smoothed_kl_map,
    upsample,
)
from app.volume import BoolArray, FloatArray
from training.config import Config
from training.data import load_scan
from training.experiments import results_cache
from training.experiments.cases import GRADES, Case, balanced, synthetic
from training.experiments.experiment import Experiment
from training.experiments.metrics import ScoreCounts, average_precision, best_dice, bootstrap_interval
from training.experiments.results import ByBundle, OracleScores, RunProvenance, Scores
from training.experiments.segmentation import mask_map

PART = "oracle_ablation"
# Cases of each grade, by bundle.
CASES = {"t1": 4, "headct": 10, "flair": 10}
SHIPPED, NO_EDGES, NO_FALSE_ALARMS, NO_MISSES, TRUE_MASK, TRUE_COUNTERPART, NO_MASK, MASK_ONLY = STEPS = (
    "as shipped",
    "as shipped, edge pixels of the lesion left out",
    "latent mask without false alarms",
    "latent mask with all of the lesion",
    "latent mask = lesion",
    "latent mask = lesion, counterpart = encoded and decoded healthy slice",
    "the same counterpart, no mask",
    "latent mask of the lesion, no image",
)


def lesion_latents(truth: BoolArray, shape: tuple[int, ...]) -> BoolArray:
    """Return which latents contain a pixel of the lesion: (M, H, W) -> `shape` (M, h, w)."""
    count, rows, columns = shape
    blocks = truth.reshape(count, rows, truth.shape[1] // rows, columns, truth.shape[2] // columns)
    return np.asarray(blocks.any(axis=(2, 4)), dtype=np.bool_)


def edge_pixels(truth: BoolArray) -> BoolArray:
    """Return the pixels on either side of a lesion's in-plane edge, (M, H, W)."""
    grown = ndimage.binary_dilation(truth, structure=IN_PLANE)
    return np.asarray(grown & ~erode_foreground(truth, 1), dtype=np.bool_)


def load_healthy_slices(config: Config, case: Case, manifest: Manifest) -> FloatArray:
    """Load the evaluated slices without the lesion, (M, 1, H, W), at the brightness that they have with it."""
    plain = to_slices(load_scan(config, case.subject).volume, manifest.preprocessing).x[case.slice_indices]
    beside = (case.foreground & ~case.truth)[:, None]
    # A lesion changes the percentile that a scan is scaled by.
    return np.asarray(plain * (np.median(case.x[beside]) / np.median(plain[beside])), dtype=np.float32)


def truth_of(step: str, case: Case) -> BoolArray:
    """Return the truth of a step, (M, H, W). Pixels that the step leaves out would count as missed."""
    return case.truth & ~edge_pixels(case.truth) if step == NO_EDGES else case.truth


def compute_maps(case: Case, healthy: FloatArray, models: Networks, manifest: Manifest) -> dict[str, FloatArray]:
    """Return the anomaly map of each step, (M, H, W).

    Parameters
    ----------
    healthy : (M, 1, H, W) ndarray
        Slices, as returned by `load_healthy_slices`.
    """
    schedule = Schedule.from_settings(manifest.schedule)
    residuals: dict[str, list[FloatArray]] = {step: [] for step in STEPS if step != NO_EDGES}
    for index, view in enumerate(manifest.views):
        process = diffusion.Diffusion(schedule, models.denoise, KeyedNoise(manifest.seed, manifest.latent_shape, index))
        encoded_view = encode_view(
            augment(case.x, view), augment(case.foreground, view), case.slice_indices, models, process
        )
        for step, values in _view_residuals(encoded_view, case, healthy, view, models, manifest).items():
            residuals[step].append(values)
    inner = erode_foreground(case.foreground, manifest.residual.erosion)
    spacing = manifest.preprocessing.spacing_mm
    maps = {
        step: postprocess_residual(average_views(each, manifest.views), case.x, inner, manifest.residual, spacing)
        for step, each in residuals.items()
    }
    maps[NO_EDGES] = np.where(edge_pixels(case.truth), np.float32(np.nan), maps[SHIPPED])
    return {step: maps[step] for step in STEPS}


def _view_residuals(
    encoded_view: EncodedView, case: Case, healthy: FloatArray, view: View, models: Networks, manifest: Manifest
) -> dict[str, FloatArray]:
    """Return the residual of each step in one view."""
    lesion = (
        lesion_latents(augment(case.truth, view), encoded_view.foreground_latents.shape)
        & encoded_view.foreground_latents
    )
    kl = smoothed_kl_map(encoded_view, manifest)
    high = np.float32(2 * manifest.kl.threshold)
    counterpart = models.decode(models.encode(augment(healthy, view)))[:, 0]

    def with_kl(kl: FloatArray) -> FloatArray:
        return compare_view(encoded_view, np.asarray(kl, dtype=np.float32), models, manifest).residual

    def with_true_counterpart(mask: BoolArray) -> FloatArray:
        difference = masked_residual(encoded_view.x[:, 0], counterpart, mask)
        floor = manifest.residual.contrast_floor
        return difference / (np.float32(floor) + local_contrast(counterpart)) if floor else difference

    return {
        SHIPPED: with_kl(kl),
        NO_FALSE_ALARMS: with_kl(np.where(lesion, kl, 0)),
        NO_MISSES: with_kl(np.where(lesion, high, kl)),
        TRUE_MASK: with_kl(np.where(lesion, high, 0)),
        TRUE_COUNTERPART: with_true_counterpart(lesion),
        NO_MASK: with_true_counterpart(np.ones_like(lesion)),
        MASK_ONLY: upsample(lesion, encoded_view.x.shape[2:]),
    }


def measure(config: Config, models: Networks, manifest: Manifest, cases: list[Case]) -> dict[str, dict[str, Scores]]:
    """Return the scores of each step, by grade."""
    maps: dict[str, list[FloatArray]] = {step: [] for step in STEPS}
    for case in tqdm(cases, desc=manifest.id, unit="scan"):
        healthy = load_healthy_slices(config, case, manifest)
        for step, values in compute_maps(case, healthy, models, manifest).items():
            maps[step].append(mask_map(values, case))
    scores: dict[str, dict[str, Scores]] = {}
    for grade in GRADES:
        mine = [i for i, case in enumerate(cases) if case.kind == grade]
        for step, each in maps.items():
            counts = ScoreCounts.from_scores([each[i] for i in mine], [truth_of(step, cases[i]) for i in mine])
            auprc, dice = (bootstrap_interval(counts, statistic) for statistic in (average_precision, best_dice))
            scores.setdefault(grade, {})[step] = Scores(auprc=auprc, dice=dice, cases=len(mine))
    return scores


def run() -> None:
    """Measure the bundles whose stored scores are not valid."""
    stored = results_cache.load(PART, ByBundle[OracleScores])
    bundles = dict(stored.bundles) if stored else {}
    for name, count in CASES.items():
        experiment = Experiment(name)
        now = experiment.provenance("validation")
        if name in bundles and results_cache.is_valid(bundles[name].provenance, now):
            continue
        start = time.perf_counter()
        config, manifest = experiment.config, experiment.manifest
        cases = balanced(synthetic(config, manifest, "validation"), count)
        grades = measure(config, experiment.networks, manifest, cases)
        provenance = RunProvenance(**now.model_dump(), total_seconds=time.perf_counter() - start)
        bundles[name] = OracleScores(provenance=provenance, grades=grades)
        results_cache.save(PART, ByBundle[OracleScores](bundles=bundles))
