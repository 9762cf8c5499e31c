"""How well maps show the tumours of test patients, beside a threshold on FLAIR's own intensity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from app.errors import CounterpartError
from app.pipeline import diffusion, residual
from app.pipeline.detect import detect
from app.pipeline.findings import dice, to_scan_result
from app.pipeline.preprocess import analysed_slices, to_slices
from app.runtime.bundle import Bundle
from app.volume import BoolArray, FloatArray
from training.config import Config
from training.splits import Split
from training.tumours import TumourScan, tumour_scans

BATCH = 16
# Of v / (1 + v): a residual over local contrast has no upper end, and an intensity of 1 lies in the middle.
BINS = 2000
BOOTSTRAP = 1000
METHODS = ("counterpart", "intensity")

Row = dict[str, Any]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Seen:
    """One patient as counts: (Z, 2, BINS) of the anomaly map and of the intensity, and three sums of the mask."""

    row: Row
    maps: dict[str, IntArray]
    overlap: tuple[int, int, int]


def counted(values: FloatArray, truth: BoolArray) -> IntArray:
    """Voxels of each slice by value, beside the tumour and in it, (Z, 2, BINS); not analysed counts as 0."""
    known = np.maximum(np.nan_to_num(values), 0)
    bins = np.minimum(known / (1 + known) * BINS, BINS - 1).astype(np.int64)
    keys = (np.arange(values.shape[2]) * 2 + truth) * BINS + bins
    return np.bincount(keys.ravel(), minlength=values.shape[2] * 2 * BINS).reshape(-1, 2, BINS)


def _above(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Wrong and right voxels at each threshold, from the highest."""
    return np.cumsum(counts[..., 0, ::-1], axis=-1), np.cumsum(counts[..., 1, ::-1], axis=-1)


def pooled_dice(counts: IntArray) -> float:
    """Dice at the one threshold that suits all these slices best."""
    wrong, right = _above(counts.sum(axis=0))
    return float((2 * right / np.maximum(wrong + right + right[-1], 1)).max())


def slice_dice(counts: IntArray) -> float:
    """Mean over slices with a tumour, each at the threshold that suits it best."""
    wrong, right = _above(with_tumour(counts))
    return float((2 * right / (wrong + right + right[:, -1:])).max(axis=1).mean())


def average_precision(counts: IntArray) -> float:
    """Area under precision over recall, in steps, over all these slices."""
    wrong, right = _above(counts.sum(axis=0))
    return float((np.diff(right, prepend=0) / right[-1] * (right / np.maximum(wrong + right, 1))).sum())


def with_tumour(counts: IntArray) -> IntArray:
    """The slices in which one was outlined."""
    ill: IntArray = counts[counts[:, 1].sum(axis=1) > 0]
    return ill


def interval_over_patients(maps: list[IntArray], draws: IntArray) -> Row:
    """Each statistic as [value, low, high]: bootstrap 95 % over patients, drawn with replacement."""
    whole = np.stack([counts.sum(axis=0) for counts in maps])
    ill = np.stack([with_tumour(counts).sum(axis=0) for counts in maps])
    by_slice = np.array([[slice_dice(counts), len(with_tumour(counts))] for counts in maps])
    statistics: dict[str, Callable[[IntArray], float]] = {
        "best_pooled": lambda drawn: pooled_dice(whole[drawn]),
        "best_pooled_tumour_slices": lambda drawn: pooled_dice(ill[drawn]),
        "best_per_slice": lambda drawn: float(np.average(by_slice[drawn, 0], weights=by_slice[drawn, 1])),
        "auprc": lambda drawn: average_precision(whole[drawn]),
    }
    everyone = np.arange(len(maps))
    return {name: spread(of(everyone), [of(drawn) for drawn in draws]) for name, of in statistics.items()}


def spread(value: float, resampled: Sequence[float]) -> list[float]:
    """[value, low, high] for a bootstrap 95 % interval."""
    return [value, *np.percentile(resampled, (2.5, 97.5)).tolist()]


def intensity_of(scan: TumourScan, bundle: Bundle) -> FloatArray:
    """What the model sees of the scan, inside the eroded head of the slices that it analyses; 0 elsewhere."""
    manifest = bundle.manifest
    slices = to_slices(scan.volume, manifest.preprocessing)
    inside = np.zeros_like(slices.foreground)
    known = analysed_slices(slices, manifest.preprocessing)
    inside[known] = residual.erode_foreground(slices.foreground[known], manifest.residual.erosion)
    return slices.grid.to_volume(np.where(inside, slices.x[:, 0], np.float32(0)))


def see(scan: TumourScan, bundle: Bundle) -> Seen:
    """Detection of one patient, as counts. Who is refused has a map of nothing: the tumour is missed."""
    row: Row = {"subject": scan.subject, "tumour_voxels": int(scan.truth.sum()), "slices": scan.volume.shape[2]}
    try:
        models = bundle.networks.in_batches(BATCH, lambda _: None)
        detection = detect(scan.volume, models, bundle.manifest)
        result = to_scan_result(scan.volume, detection, bundle.manifest)
        values, mask, row["outcome"] = result.anomaly, result.mask > 0, "analysed"
    except CounterpartError as error:
        values, mask, row["outcome"] = np.zeros(scan.volume.shape, np.float32), np.zeros_like(scan.truth), error.code
    known = np.isfinite(values)
    maps = {"counterpart": counted(values, scan.truth), "intensity": counted(intensity_of(scan, bundle), scan.truth)}
    row |= {
        "slices_analysed": int(known.any(axis=(0, 1)).sum()) if row["outcome"] == "analysed" else 0,
        "tumour_not_analysed": float((scan.truth & ~known).sum() / scan.truth.sum()),
        "dice": dice(mask, scan.truth),
        "best_dice": pooled_dice(maps["counterpart"]),
        "intensity_best_dice": pooled_dice(maps["intensity"]),
    }
    return Seen(row, maps, (int((mask & scan.truth).sum()), int(mask.sum()), int(scan.truth.sum())))


def evaluate_tumours(config: Config, bundle: Bundle, split: Split) -> list[Row]:
    """A row a test patient, and one for each method over all of them, with bootstrap intervals over patients."""
    seen = [see(scan, bundle) for scan in tqdm(tumour_scans(config, split.test), total=len(split.test), desc="tumours")]
    draws = np.random.default_rng(0).integers(len(seen), size=(BOOTSTRAP, len(seen)))
    rows = [each.row for each in seen]
    rows += [
        {"method": method, **interval_over_patients([each.maps[method] for each in seen], draws)} for method in METHODS
    ]
    sums = np.array([each.overlap for each in seen])
    rows[-2]["shipped_pooled"] = spread(_dice(sums), [_dice(sums[drawn]) for drawn in draws])
    return rows


def _dice(sums: IntArray) -> float:
    """Dice of the shipped masks of some patients together, from (overlap, found, truth) of each."""
    overlap, found, truth = sums.sum(axis=0)
    return float(2 * overlap / max(found + truth, 1))
