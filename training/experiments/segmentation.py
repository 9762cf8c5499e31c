"""Experiments 2 and 3: anomaly maps of every method on the same slices, against the outlined lesions."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from app.manifest import Manifest
from app.pipeline.diffusion import Networks
from app.pipeline.findings import dice, label_findings
from app.pipeline.methods import METHODS
from app.pipeline.scores import median_filter
from app.volume import FloatArray
from training.experiments.cases import Case
from training.experiments.manifests import without_ood_check
from training.experiments.methods import COUNTERPART
from training.experiments.metrics import ScoreCounts, average_precision, best_dice
from training.experiments.results import Choice, ScanScores
from training.experiments.results_cache import Outcome

# Case -> anomaly map of its evaluated slices, (M, H, W).
AnomalyMap = Callable[[Case], FloatArray]

BATCH = 16


def gaussian(values: FloatArray, pixels: float) -> FloatArray:
    """Smooth within each slice."""
    result: FloatArray = ndimage.gaussian_filter(values, (0, pixels, pixels))
    return result


# Smoothing of a baseline's map within each slice, to choose from.
NO_FILTER = "as it is"
FILTERS: dict[str, Callable[[FloatArray], FloatArray]] = {
    NO_FILTER: lambda values: values,
    **{f"Gaussian of {p:g}": partial(gaussian, pixels=p) for p in (1.0, 2.0)},
    **{f"median of {p}": partial(median_filter, pixels=p) for p in (3, 5)},
}


@dataclass(frozen=True)
class ComparedMethod:
    """Method that can run.

    Attributes
    ----------
    name : str
        Key of `training.experiments.methods.METHOD_INFO`, or another name for the progress bar.
    variants : dict of str to callable
        Maps to choose from on validation cases.
    smoothing : tuple of str
        Names of `FILTERS` to choose from.
    parameters : int
        Number of parameters of the networks of the method.
    time_per_slice : callable, optional
        Cases -> seconds, if timing the maps would measure cached work.
    """

    name: str
    variants: dict[str, AnomalyMap]
    smoothing: tuple[str, ...] = tuple(FILTERS)
    parameters: int = 0
    time_per_slice: Callable[[Sequence[Case]], float] | None = None


def counterpart_map(models: Networks, manifest: Manifest) -> AnomalyMap:
    """Return the service's own anomaly map, without the out-of-distribution check. It is 0 where not analysed."""
    accepting = without_ood_check(manifest)

    def compute(case: Case) -> FloatArray:
        anomaly = METHODS[accepting.method](case.volume, models, accepting).anomaly[case.slice_indices]
        # A filter would spread NaN. `mask_map` restores it.
        return np.nan_to_num(anomaly)

    return compute


def mask_map(values: FloatArray, case: Case) -> FloatArray:
    """Set a map to NaN in pixels that are not evaluated, (M, H, W)."""
    return np.where(case.evaluated, values, np.float32(np.nan))


def count_scores(maps: Sequence[FloatArray], cases: Sequence[Case]) -> ScoreCounts:
    """Count the evaluated pixels of maps by score and truth."""
    return ScoreCounts.from_scores([mask_map(m, c) for m, c in zip(maps, cases, strict=True)], [c.truth for c in cases])


def choose(method: ComparedMethod, cases: Sequence[Case]) -> Choice:
    """Choose the variant and smoothing with the highest AUPRC on validation cases."""
    best, chosen = -1.0, Choice(variant=next(iter(method.variants)), smoothing=method.smoothing[0])
    if len(method.variants) * len(method.smoothing) == 1:
        return chosen
    for variant, compute in method.variants.items():
        plain = [compute(case) for case in cases]
        for smoothing in method.smoothing:
            reached = count_scores([FILTERS[smoothing](p) for p in plain], cases).pooled(average_precision)
            if reached > best:
                best, chosen = reached, Choice(variant=variant, smoothing=smoothing)
    return chosen


def score_method(
    method: ComparedMethod, validation: Sequence[Case], test: Sequence[Case], manifest: Manifest
) -> Outcome:
    """Choose on validation cases, then run on the test cases."""
    choice = choose(method, validation)
    compute = method.variants[choice.variant]
    maps, seconds = [], 0.0
    for case in tqdm(test, desc=method.name, unit="scan"):
        start = time.perf_counter()
        maps.append(FILTERS[choice.smoothing](compute(case)))
        seconds += time.perf_counter() - start
    counts, scans = {}, {}
    for kind in dict.fromkeys(c.kind for c in test):
        mine = [(values, case) for values, case in zip(maps, test, strict=True) if case.kind == kind]
        counts[kind] = count_scores([values for values, _ in mine], [case for _, case in mine])
        pairs = list(zip(counts[kind].positive, counts[kind].negative, strict=True))
        is_own = method.name == COUNTERPART
        scans[kind] = ScanScores(
            auprc=tuple(average_precision(p, n) for p, n in pairs),
            dice=tuple(best_dice(p, n) for p, n in pairs),
            truth_pixels=tuple(float(case.truth.sum()) for _, case in mine),
            shipped=tuple(shipped_dice(values, case, manifest) for values, case in mine) if is_own else (),
        )
    each = method.time_per_slice(test) if method.time_per_slice else seconds / sum(len(c.slice_indices) for c in test)
    return Outcome(counts, scans, choice, each, method.parameters)


def shipped_dice(values: FloatArray, case: Case, manifest: Manifest) -> float:
    """Return Dice of the mask that a map (M, H, W) becomes at the bundle's thresholds."""
    labels, _ = label_findings(mask_map(values, case), manifest.residual, manifest.preprocessing.voxel_ml)
    return dice(labels > 0, case.truth)
