"""Runs of a finished bundle on one scan, as the service runs it, and their scores."""

import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from app.errors import CounterpartError
from app.pipeline.brain_extraction import BrainExtraction, extract_brain
from app.pipeline.detect import Detection, ScanResult, to_scan_result
from app.pipeline.findings import dice
from app.pipeline.methods import METHODS
from app.runtime.bundle import Bundle
from app.volume import BoolArray, FloatArray, Volume
from training.lesion_insertion import LesionedScan
from training.lesion_scores import score_lesions

BATCH = 16

Row = dict[str, Any]


class Analysis(NamedTuple):
    """Outcome of a scan: "analysed" with the result, or the error code of the refusal without one."""

    outcome: str
    result: ScanResult | None


def best_dice(anomaly: npt.NDArray[np.float32], truth: npt.NDArray[np.bool_]) -> float:
    """Return the Dice at the threshold that is best for this scan: an upper bound for every fixed threshold."""
    values = np.nan_to_num(anomaly)
    order = np.argsort(-values, axis=None, kind="stable")[: 20 * max(int(truth.sum()), 1)]
    hits = np.cumsum(truth.ravel()[order])
    sizes = np.arange(1, len(order) + 1)
    return float((2 * hits / (sizes + truth.sum())).max())


def run_detection(volume: Volume, bundle: Bundle) -> tuple[Detection, ScanResult, float]:
    """Return detection, result and seconds of one scan."""
    start = time.perf_counter()
    models = bundle.networks.in_batches(BATCH, lambda _: None)
    detection = METHODS[bundle.manifest.method](volume, models, bundle.manifest)
    return detection, to_scan_result(volume, detection, bundle.manifest), time.perf_counter() - start


def extract_brain_if_needed(volume: Volume, bundle: Bundle) -> Volume:
    """Return the volume that the service analyses. It is the extracted brain if the bundle needs one."""
    if bundle.extractor is None:
        return volume
    brain = extract_brain(volume, bundle.extractor.networks)
    return brain.volume if isinstance(brain, BrainExtraction) else volume


def analyse(volume: Volume, bundle: Bundle, *, extract: bool = True) -> Analysis:
    """Run a bundle on a scan, after the extraction of the brain unless the scan is an extracted brain."""
    try:
        brain = extract_brain_if_needed(volume, bundle) if extract else volume
        return Analysis("analysed", run_detection(brain, bundle)[1])
    except CounterpartError as error:
        return Analysis(error.code, None)


def ood_scores(detection: Detection) -> Row:
    """Return the scores of the out-of-distribution check."""
    scores = detection.scores
    return {
        "median_kl_range": scores.median_kl_range,
        "reconstruction": scores.reconstruction,
        "outlier_fraction": scores.outlier_fraction,
    }


def score_truth(
    analysis: Analysis, truth: BoolArray, voxel_ml: float, slices: npt.NDArray[np.int64] | None = None
) -> Row:
    """Compare the findings of a scan with its true lesions.

    A refused scan has a Dice of 0, and none of its lesions is found.

    Parameters
    ----------
    analysis : Analysis
    truth : (X, Y, Z) ndarray of bool
    voxel_ml : float
    slices : (M,) ndarray of int, optional
        Slices that are compared, by default all.
    """
    chosen = np.arange(truth.shape[2]) if slices is None else slices
    truth = truth[:, :, chosen]
    row: Row = {"outcome": analysis.outcome, "truth_ml": float(truth.sum()) * voxel_ml}
    if analysis.result is None:
        missed = score_lesions(np.zeros(truth.shape, np.uint16), truth, voxel_ml)
        return row | {"dice": 0.0, "best_dice": 0.0, "lesions": missed.lesions}
    labels = analysis.result.labels[:, :, chosen]
    scores = score_lesions(labels, truth, voxel_ml)
    return row | {
        "dice": dice(labels > 0, truth),
        "best_dice": best_dice(analysis.result.anomaly[:, :, chosen], truth),
        "found_ml": float((labels > 0).sum()) * voxel_ml,
        "lesions": scores.lesions,
        "false_findings": scores.false_findings,
        "false_ml": scores.false_ml,
    }


def insert_into_head(head: Volume, brain: Volume, lesioned: LesionedScan) -> LesionedScan:
    """Return the head with the lesion of its extracted brain, so that the brain is extracted with the lesion.

    Parameters
    ----------
    head : Volume
        Healthy scan. It is the brain itself if it is skull-stripped.
    brain : Volume
        Healthy extracted brain.
    lesioned : LesionedScan
        Brain with a lesion.
    """
    change: FloatArray = lesioned.volume.array - brain.array
    return LesionedScan(Volume(head.array + change, head.affine), lesioned.truth)
