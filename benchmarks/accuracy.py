"""Best-achievable Dice and AUPRC on synthetic lesions in validation subjects, on a few slices of each scan."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from app.errors import CounterpartError
from app.manifest import Manifest
from app.pipeline.diffusion import latent_foreground
from app.pipeline.preprocess import analysed_slices, to_slices
from app.volume import BoolArray, FloatArray, Volume
from training.config import Config
from training.data import load_split, load_volume, subject_path
from training.experiments.metrics import average_precision, best_dice, exact_counts
from training.lesion_insertion import insert_lesion, load_lesion_shape

SHAPES = ("patient11", "patient15", "patient22", "patient28", "patient09")
CONTRASTS = (0.35, -0.35)
# Number of slices with the lesion, and of slices without it, in each case.
SLICES = 4
# The paper's threshold comes from so many slices of so many healthy validation subjects.
HEALTHY_SLICES = 4
HEALTHY_SUBJECTS = 3
# Percentile of the KL of healthy latents above which the paper's method resamples a latent.
PERCENTILE = 97.5

IntArray = npt.NDArray[np.int64]
# volume, x (M, 1, H, W), foreground (M, H, W), indices (M,) among the analysed slices -> anomaly map (M, H, W).
AnomalyMap = Callable[[Volume, FloatArray, BoolArray, IntArray], FloatArray]


def make_cases(config: Config, count: int) -> Iterator[tuple[Volume, BoolArray]]:
    """Yield the first scans with a lesion and their truth masks: each shape and contrast in one validation subject."""
    subjects = load_split(config.data.splits).validation
    for i, (shape, contrast) in enumerate(itertools.islice(itertools.product(SHAPES, CONTRASTS), count)):
        volume = load_volume(subject_path(config, subjects[i % len(subjects)]))
        case = insert_lesion(volume, load_lesion_shape(shape), contrast, i)
        yield case.volume, case.truth


def choose_slices(truth: BoolArray) -> IntArray:
    """Choose evenly spaced slices with the lesion and as many without it, (N, H, W) -> (M,)."""
    has_lesion = truth.any(axis=(1, 2))
    groups = [np.flatnonzero(group) for group in (has_lesion, ~has_lesion)]
    chosen = [g[np.unique(np.linspace(0, len(g) - 1, SLICES).round().astype(int))] for g in groups if len(g)]
    return np.sort(np.concatenate(chosen))


def measure_accuracy(config: Config, manifest: Manifest, count: int, anomaly_map: AnomalyMap) -> dict[str, Any]:
    """Return Dice and AUPRC of each case. A refused scan counts as an empty map.

    Parameters
    ----------
    config : Config
    manifest : Manifest
    count : int
        Number of cases.
    anomaly_map : callable
        The method.
    """
    dices, precisions, refused = [], [], 0
    for volume, mask in make_cases(config, count):
        slices = to_slices(volume, manifest.preprocessing)
        analysed = analysed_slices(slices, manifest.preprocessing)
        truth = slices.grid.sample_volume(mask.astype(np.float32))[analysed] > 0.5
        if not truth.any():
            continue
        chosen = choose_slices(truth)
        truth = truth[chosen]
        try:
            x, foreground = slices.x[analysed[chosen]], slices.foreground[analysed[chosen]]
            scores = anomaly_map(volume, x, foreground, chosen)
        except CounterpartError:
            refused += 1
            scores = np.zeros(truth.shape, np.float32)
        counts = exact_counts(scores, truth)
        dices.append(best_dice(*counts))
        precisions.append(average_precision(*counts))
    return {"dice": dices, "auprc": precisions, "refused": refused, "slices": 2 * SLICES}


def healthy_threshold(config: Config, manifest: Manifest, latent_kl: Callable[[FloatArray], FloatArray]) -> float:
    """Return the paper's threshold: a percentile of the KL map of healthy validation latents."""
    values = []
    for subject in load_split(config.data.splits).validation[:HEALTHY_SUBJECTS]:
        slices = to_slices(load_volume(subject_path(config, subject)), manifest.preprocessing)
        analysed = analysed_slices(slices, manifest.preprocessing)
        # The first and the last slice are left out.
        evenly = np.unique(np.linspace(0, len(analysed) - 1, HEALTHY_SLICES + 2).round().astype(int))[1:-1]
        chosen = analysed[evenly]
        latents = latent_foreground(slices.foreground[chosen], manifest.latent.downsampling)
        values.append(latent_kl(slices.x[chosen])[latents])
    return float(np.percentile(np.concatenate(values), PERCENTILE))
