"""Which step loses a lesion: the latent mask, what is imagined under it, or the autoencoder.

Synthetic lesions in healthy slices of validation subjects: here the truth is known, and so is the healthy counterpart.
One step after another is given it.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from app.manifest import Manifest, View
from app.pipeline import diffusion, residual
from app.pipeline.detect import compare_view
from app.pipeline.diffusion import EncodedView, smoothed_kl_map
from app.pipeline.networks import Networks
from app.pipeline.preprocess import to_slices
from app.pipeline.residual import augment, average_views, postprocess_residual
from app.volume import BoolArray, FloatArray
from training.config import Config
from training.data import load_scan
from training.experiments import kept
from training.experiments.candidates import seen_in_views
from training.experiments.cases import GRADES, Case, synthetic
from training.experiments.experiment import Document, Experiment
from training.experiments.metrics import Counts, average_precision, best_dice, interval
from training.experiments.segmentation import judged

PART = "bounds"
# Of each bundle, so many cases of each grade.
CASES = {"t1": 4, "headct": 10, "flair": 10}
SHIPPED, NO_EDGES, NO_FALSE, NO_MISSED, MASK, COUNTERPART, UNMASKED, FLOOR = STEPS = (
    "as shipped",
    "as shipped, but for a pixel on either side of the lesion's edge, which does not count",
    "no false alarms: the latent mask without what is no lesion",
    "no misses: the latent mask and all of the lesion",
    "the latent mask is the lesion",
    "the same, and the counterpart is the healthy slice, encoded and decoded",
    "that counterpart everywhere, without a mask",
    "the lesion's latent mask itself, up-sampled: no image at all",
)


def touched(truth: BoolArray, shape: tuple[int, ...]) -> BoolArray:
    """Latents of which any pixel is the lesion's: (K, H, W) -> (K, h, w), `shape`."""
    count, rows, columns = shape
    blocks = truth.reshape(count, rows, truth.shape[1] // rows, columns, truth.shape[2] // columns)
    return np.asarray(blocks.any(axis=(2, 4)), dtype=np.bool_)


def edges(truth: BoolArray) -> BoolArray:
    """A pixel on either side of a lesion's edge in its slices, (K, H, W): there, the truth is a matter of rounding."""
    grown = ndimage.binary_dilation(truth, structure=diffusion.IN_PLANE)
    return np.asarray(grown & ~residual.erode_foreground(truth, 1), dtype=np.bool_)


def healthy_slices(config: Config, case: Case, manifest: Manifest) -> FloatArray:
    """The judged slices without the lesion, (K, 1, H, W), as bright beside it as they are with it."""
    plain = to_slices(load_scan(config, case.subject).volume, manifest.preprocessing).x[case.known]
    beside = (case.foreground & ~case.truth)[:, None]
    # A lesion moves the percentile that a scan is divided by.
    return np.asarray(plain * (np.median(case.x[beside]) / np.median(plain[beside])), dtype=np.float32)


def truth_of(step: str, case: Case) -> BoolArray:
    """What there is to be found, (K, H, W): what is not judged would count as missed."""
    return case.truth & ~edges(case.truth) if step == NO_EDGES else case.truth


def maps(case: Case, healthy: FloatArray, models: Networks, manifest: Manifest) -> dict[str, FloatArray]:
    """The anomaly map of each step, (K, H, W).

    Parameters
    ----------
    case : Case
    healthy : (K, 1, H, W) ndarray
        Of `healthy_slices`.
    """
    found: dict[str, list[FloatArray]] = {step: [] for step in STEPS if step != NO_EDGES}
    for view, seen in seen_in_views(case, models, manifest):
        for step, values in _residuals(seen, case, healthy, view, models, manifest).items():
            found[step].append(values)
    inner = residual.erode_foreground(case.foreground, manifest.residual.erosion)
    spacing = manifest.preprocessing.spacing_mm
    settled = {
        step: postprocess_residual(average_views(each, manifest.views), case.x, inner, manifest.residual, spacing)
        for step, each in found.items()
    }
    settled[NO_EDGES] = np.where(edges(case.truth), np.float32(np.nan), settled[SHIPPED])
    return {step: settled[step] for step in STEPS}


def _residuals(
    seen: EncodedView, case: Case, healthy: FloatArray, view: View, models: Networks, manifest: Manifest
) -> dict[str, FloatArray]:
    """The residual of each step in one view."""
    lesion = touched(augment(case.truth, view), seen.foreground_latents.shape) & seen.foreground_latents
    kl = smoothed_kl_map(seen, manifest)
    high = np.float32(2 * manifest.kl.threshold)
    counterpart = models.decode(models.encode(augment(healthy, view)))[:, 0]

    def under(kl: FloatArray) -> FloatArray:
        return compare_view(seen, np.asarray(kl, dtype=np.float32), models, manifest).residual

    def against(mask: BoolArray) -> FloatArray:
        off = residual.masked_residual(seen.x[:, 0], counterpart, mask)
        floor = manifest.residual.contrast_floor
        return residual.weight_residual(off, counterpart, kl, seen.foreground_latents, floor, by_kl=False)

    return {
        SHIPPED: under(kl),
        NO_FALSE: under(np.where(lesion, kl, 0)),
        NO_MISSED: under(np.where(lesion, high, kl)),
        MASK: under(np.where(lesion, high, 0)),
        COUNTERPART: against(lesion),
        UNMASKED: against(np.ones_like(lesion)),
        FLOOR: residual.upsample(lesion, seen.x.shape[2:]),
    }


def spread_cases(every: Iterable[Case], count: int) -> list[Case]:
    """So many of each grade, half of them bright, evenly spread over the subjects; signs take turns in `synthetic`."""
    found = list(every)
    chosen = []
    for kind in GRADES:
        mine = [c for c in found if c.kind == kind]
        for sign in (mine[::2], mine[1::2]):
            at = np.linspace(0, len(sign) - 1, count // 2).round().astype(int)
            chosen += [sign[i] for i in np.unique(at)]
    return chosen


def measure(config: Config, models: Networks, manifest: Manifest, cases: list[Case]) -> Document:
    """AUPRC and best-achievable Dice of each step, by grade."""
    found: dict[str, list[FloatArray]] = {step: [] for step in STEPS}
    for case in tqdm(cases, desc=manifest.id, unit="scan"):
        healthy = healthy_slices(config, case, manifest)
        for step, values in maps(case, healthy, models, manifest).items():
            found[step].append(judged(values, case))
    rows: Document = {}
    for kind in GRADES:
        mine = [i for i, case in enumerate(cases) if case.kind == kind]
        for step, each in found.items():
            counts = Counts.of([each[i] for i in mine], [truth_of(step, cases[i]) for i in mine])
            of = {"auprc": average_precision, "dice": best_dice}
            told = {key: asdict(interval(counts, statistic)) for key, statistic in of.items()}
            rows.setdefault(kind, {})[step] = told | {"cases": len(mine)}
    return rows


def run() -> None:
    """Measure the bundles whose numbers no longer count."""
    path = kept.RESULTS / f"{PART}.json"
    document: Document = kept.read(PART) if path.exists() else {"bundles": {}}
    for name, count in CASES.items():
        e = Experiment(name)
        now = e.provenance("validation")
        if kept.fits(document["bundles"].get(name, {}).get("provenance", {}), now):
            continue
        start = time.perf_counter()
        cases = spread_cases(synthetic(e.config, e.manifest, "validation"), count)
        rows = measure(e.config, e.networks, e.manifest, cases)
        told = {"provenance": now, "whole_seconds": time.perf_counter() - start}
        document["bundles"][name] = told | {"grades": rows}
        kept.write(PART, document)
