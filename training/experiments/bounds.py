"""Which step loses a lesion: the latent mask, what is imagined under it, or the autoencoder.

Synthetic lesions of healthy validation subjects: here the truth is known, and so is the true healthy counterpart. One
step after another is given it.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
from tqdm import tqdm

from app.manifest import Manifest, View
from app.pipeline import anomaly
from app.pipeline.detect import Seen, compare, mean_view, see, smooth, surprise
from app.pipeline.models import Models
from app.pipeline.noise import KeyedNoise
from app.pipeline.prepare import BoolArray, to_slices
from app.pipeline.schedule import Schedule
from app.pipeline.views import turn
from app.volume import FloatArray
from training.config import Config
from training.data import load_scan
from training.experiments import kept
from training.experiments.cases import GRADES, Case, synthetic
from training.experiments.experiment import Document, Experiment
from training.experiments.metrics import Counts, average_precision, best_dice, interval
from training.experiments.segmentation import judged

PART = "bounds"
# Of each bundle, so many cases of each grade.
CASES = {"t1": 6, "headct": 10, "flair": 11}
SHIPPED, MASK, COUNTERPART, UNMASKED = (
    "as shipped",
    "the latent mask is the lesion's",
    "and the counterpart is the healthy slice, encoded and decoded",
    "that counterpart, without any mask",
)
STEPS = (SHIPPED, MASK, COUNTERPART, UNMASKED)


def touched(truth: BoolArray, shape: tuple[int, ...]) -> BoolArray:
    """Latents of which any pixel is the lesion's: (K, H, W) -> (K, h, w), `shape`."""
    count, rows, columns = shape
    blocks = truth.reshape(count, rows, truth.shape[1] // rows, columns, truth.shape[2] // columns)
    return np.asarray(blocks.any(axis=(2, 4)), dtype=np.bool_)


def maps(case: Case, healthy: FloatArray, models: Models, manifest: Manifest) -> dict[str, FloatArray]:
    """The anomaly map of each step, (K, H, W).

    Parameters
    ----------
    case : Case
    healthy : (K, 1, H, W) ndarray
        The judged slices without the lesion.
    """
    s = manifest.schedule
    schedule = Schedule.linear(s.steps, s.beta_start, s.beta_end)
    found: dict[str, list[FloatArray]] = {step: [] for step in STEPS}
    for index, view in enumerate(manifest.views):
        noise = KeyedNoise(manifest.seed, manifest.latent_shape, index)
        diffusion = anomaly.Diffusion(schedule, models.denoise, noise)
        seen = see(turn(case.x, view), turn(case.foreground, view), case.known, models, diffusion)
        for step, values in _residuals(seen, case, healthy, view, models, manifest).items():
            found[step].append(values)
    return {step: _finished(mean_view(each, manifest.views), case, manifest) for step, each in found.items()}


def _residuals(
    seen: Seen, case: Case, healthy: FloatArray, view: View, models: Models, manifest: Manifest
) -> dict[str, FloatArray]:
    """The residual of each step in one view."""
    lesion = touched(turn(case.truth, view), seen.latents.shape)
    certain = np.where(lesion, np.float32(2 * manifest.kl.threshold), np.float32(0))
    counterpart = models.decode(models.encode(turn(healthy, view)))[:, 0]

    def against(mask: BoolArray) -> FloatArray:
        off = anomaly.residual(seen.x[:, 0], counterpart, mask)
        floor = manifest.residual.contrast_floor
        return anomaly.weigh(off, counterpart, certain, seen.latents, floor, by_kl=False)

    return {
        SHIPPED: compare(seen, surprise(seen, manifest), models, manifest).residual,
        MASK: compare(seen, certain, models, manifest).residual,
        COUNTERPART: against(lesion & seen.latents),
        UNMASKED: against(np.ones_like(lesion)),
    }


def _finished(residual: FloatArray, case: Case, manifest: Manifest) -> FloatArray:
    """As `detect` ends."""
    settings = manifest.residual
    inner = anomaly.erode(case.foreground, settings.erosion)
    residual = anomaly.median(residual, settings.median_pixels)
    return smooth(residual, inner, settings.smoothing_mm, manifest.preparation.spacing_mm)


def spread_cases(every: Iterable[Case], count: int) -> list[Case]:
    """So many of each grade, evenly spread over the subjects."""
    found = list(every)
    chosen = []
    for kind in GRADES:
        mine = [c for c in found if c.kind == kind]
        chosen += [mine[i] for i in np.unique(np.linspace(0, len(mine) - 1, count).round().astype(int))]
    return chosen


def measure(config: Config, models: Models, manifest: Manifest, cases: list[Case]) -> Document:
    """AUPRC and best-achievable Dice of each step, by grade."""
    found: dict[str, list[FloatArray]] = {step: [] for step in STEPS}
    for case in tqdm(cases, desc=manifest.id, unit="scan"):
        volume = load_scan(config, case.subject).volume
        healthy = to_slices(volume, manifest.preparation).x[case.known]
        for step, values in maps(case, healthy, models, manifest).items():
            found[step].append(judged(values, case))
    rows: Document = {}
    for kind in GRADES:
        mine = [i for i, case in enumerate(cases) if case.kind == kind]
        for step, each in found.items():
            counts = Counts.of([each[i] for i in mine], [cases[i].truth for i in mine])
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
        rows = measure(e.config, e.models, e.manifest, cases)
        told = {"provenance": now, "whole_seconds": time.perf_counter() - start}
        document["bundles"][name] = told | {"grades": rows}
        kept.write(PART, document)
