"""Scores of the anomaly maps on outlined tumours of test patients, compared with a threshold on the FLAIR intensity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from app.errors import CounterpartError
from app.manifest import Manifest
from app.pipeline.detect import to_scan_result
from app.pipeline.diffusion import Networks
from app.pipeline.findings import dice
from app.pipeline.methods import METHODS
from app.pipeline.preprocess import analysed_slices, to_slices
from app.pipeline.scores import erode_foreground
from app.runtime.bundle import Bundle
from app.volume import BoolArray, FloatArray
from training.config import Config
from training.data import Split
from training.experiments.manifests import changed
from training.experiments.metrics import average_precision, best_dice
from training.image_archive import TumourScan, archive_settings, tumour_scans

BATCH = 16
# Bins of v / (1 + v): a residual divided by the local contrast has no upper limit.
BINS = 2000
BOOTSTRAP = 1000
METHOD_NAMES = ("counterpart", "intensity")

Row = dict[str, Any]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PatientCounts:
    """Scores of one patient.

    Attributes
    ----------
    row : dict
        Row of the patient in the table.
    histograms : dict of str to (Z, 2, BINS) ndarray of int
        See `count_voxels`, by method.
    overlap : tuple of int
        Voxels of the intersection of mask and tumour, of the mask, and of the tumour.
    """

    row: Row
    histograms: dict[str, IntArray]
    overlap: tuple[int, int, int]


def count_voxels(values: FloatArray, truth: BoolArray) -> IntArray:
    """Return the voxels of each slice by value, outside and inside the tumour, (Z, 2, BINS); NaN counts as 0."""
    finite = np.maximum(np.nan_to_num(values), 0)
    bins = np.minimum(finite / (1 + finite) * BINS, BINS - 1).astype(np.int64)
    keys = (np.arange(values.shape[2]) * 2 + truth) * BINS + bins
    return np.bincount(keys.ravel(), minlength=values.shape[2] * 2 * BINS).reshape(-1, 2, BINS)


def pooled_dice(counts: IntArray) -> float:
    """Return the Dice of slices (N, 2, BINS) at the single threshold that is best for all of them."""
    return best_dice(*counts.sum(axis=0)[::-1])


def pooled_precision(counts: IntArray) -> float:
    """Return the average precision of the voxels of slices (N, 2, BINS)."""
    return average_precision(*counts.sum(axis=0)[::-1])


def slice_dice(counts: IntArray) -> float:
    """Return the mean Dice of the slices with a tumour, each at the threshold that is best for it."""
    return float(np.mean([pooled_dice(slice_counts[None]) for slice_counts in with_tumour(counts)]))


def with_tumour(counts: IntArray) -> IntArray:
    """Return the slices with an outlined tumour."""
    selected: IntArray = counts[counts[:, 1].sum(axis=1) > 0]
    return selected


def patient_intervals(histograms: list[IntArray], draws: IntArray) -> Row:
    """Return each statistic as [value, low, high]: bootstrap 95 % intervals over patients.

    Parameters
    ----------
    histograms : list of (Z, 2, BINS) ndarray of int
        One per patient.
    draws : (BOOTSTRAP, patients) ndarray of int
        Indices of the patients of each resample.
    """
    whole = np.stack([counts.sum(axis=0) for counts in histograms])
    tumour = np.stack([with_tumour(counts).sum(axis=0) for counts in histograms])
    by_slice = np.array([[slice_dice(counts), len(with_tumour(counts))] for counts in histograms])
    statistics: dict[str, Callable[[IntArray], float]] = {
        "best_pooled": lambda drawn: pooled_dice(whole[drawn]),
        "best_pooled_tumour_slices": lambda drawn: pooled_dice(tumour[drawn]),
        "best_per_slice": lambda drawn: float(np.average(by_slice[drawn, 0], weights=by_slice[drawn, 1])),
        "auprc": lambda drawn: pooled_precision(whole[drawn]),
    }
    everyone = np.arange(len(histograms))
    return {name: interval(of(everyone), [of(drawn) for drawn in draws]) for name, of in statistics.items()}


def interval(value: float, resampled: Sequence[float]) -> list[float]:
    """Return [value, low, high] of a bootstrap 95 % interval."""
    return [value, *np.percentile(resampled, (2.5, 97.5)).tolist()]


def manifest_of_stacks(manifest: Manifest, config: Config) -> Manifest:
    """Return the manifest with a smaller analysed height, because the stacks do not show the top of the head.

    In service, this height begins at the vertex.
    """
    head_box, missing = manifest.preprocessing.head_box, archive_settings(config).above_stack_mm
    if head_box is None or head_box.reach_mm is None or missing is None:
        return manifest
    smaller = changed(head_box, reach_mm=head_box.reach_mm - missing)
    return changed(manifest, preprocessing=changed(manifest.preprocessing, head_box=smaller))


def intensity_map(scan: TumourScan, manifest: Manifest) -> FloatArray:
    """Return the preprocessed intensity inside the valid mask on the scan's grid; 0 elsewhere."""
    slices = to_slices(scan.volume, manifest.preprocessing)
    valid = np.zeros_like(slices.foreground)
    analysed = analysed_slices(slices, manifest.preprocessing)
    valid[analysed] = erode_foreground(slices.foreground[analysed], manifest.residual.erosion)
    return slices.grid.to_volume(np.where(valid, slices.x[:, 0], np.float32(0)))


def count_patient(scan: TumourScan, networks: Networks, manifest: Manifest) -> PatientCounts:
    """Run the detection on one patient. A refused scan has an empty map, so that the tumour counts as missed."""
    row: Row = {"subject": scan.subject, "tumour_voxels": int(scan.truth.sum()), "slices": scan.volume.shape[2]}
    try:
        detection = METHODS[manifest.method](scan.volume, networks, manifest)
        result = to_scan_result(scan.volume, detection, manifest)
        values, mask, row["outcome"] = result.anomaly, result.mask > 0, "analysed"
    except CounterpartError as error:
        values, mask, row["outcome"] = np.zeros(scan.volume.shape, np.float32), np.zeros_like(scan.truth), error.code
    analysed = np.isfinite(values)
    histograms = {
        "counterpart": count_voxels(values, scan.truth),
        "intensity": count_voxels(intensity_map(scan, manifest), scan.truth),
    }
    row |= {
        "slices_analysed": int(analysed.any(axis=(0, 1)).sum()) if row["outcome"] == "analysed" else 0,
        "tumour_not_analysed": float((scan.truth & ~analysed).sum() / scan.truth.sum()),
        "dice": dice(mask, scan.truth),
        "best_dice": pooled_dice(histograms["counterpart"]),
        "intensity_best_dice": pooled_dice(histograms["intensity"]),
    }
    overlap = (int((mask & scan.truth).sum()), int(mask.sum()), int(scan.truth.sum()))
    return PatientCounts(row, histograms, overlap)


def evaluate_tumours(config: Config, bundle: Bundle, split: Split) -> list[Row]:
    """Return one row per test patient, and one per method over all of them with intervals over patients."""
    scans = tqdm(tumour_scans(config, split.test), total=len(split.test), desc="tumours")
    networks, manifest = bundle.networks.in_batches(BATCH, lambda _: None), manifest_of_stacks(bundle.manifest, config)
    patients = [count_patient(scan, networks, manifest) for scan in scans]
    draws = np.random.default_rng(0).integers(len(patients), size=(BOOTSTRAP, len(patients)))
    rows = [patient.row for patient in patients]
    rows += [
        {"method": method, **patient_intervals([patient.histograms[method] for patient in patients], draws)}
        for method in METHOD_NAMES
    ]
    overlaps = np.array([patient.overlap for patient in patients])
    resampled = [_overlap_dice(overlaps[drawn]) for drawn in draws]
    rows[-2]["shipped_pooled"] = interval(_overlap_dice(overlaps), resampled)
    return rows


def _overlap_dice(overlaps: IntArray) -> float:
    """Return the Dice of the masks of several patients together, from their `overlap`."""
    intersection, found, truth = overlaps.sum(axis=0)
    return float(2 * intersection / max(found + truth, 1))
