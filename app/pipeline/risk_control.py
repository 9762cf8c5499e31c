"""Threshold for a target of false findings: findings at candidate thresholds, and conformal risk control."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from app.manifest import Manifest, Residual
from app.pipeline.detect import Detection
from app.pipeline.findings import LabelArray, label_findings

# Candidates for the threshold, as multiples of the model's threshold, in steps of 9 %. 1 is one of them.
FACTORS = 2.0 ** np.linspace(-1, 4, 41)
# Losses above this multiple of the target count as this multiple. A larger limit protects better against rare large
# volumes, and leaves less for all others: with ten scans, 5 leaves a mean of 0.6 times the target.
LOSS_LIMIT = 5.0


def label_at_factors(detection: Detection, manifest: Manifest, voxel_ml: float) -> Iterator[LabelArray]:
    """Yield the label map (X, Y, Z) of the findings at each of `FACTORS`, as the service makes it.

    Each map is as large as the scan, so use one before the next.
    """
    anomaly = detection.slices.grid.to_volume(detection.anomaly)
    for factor in FACTORS:
        yield label_findings(anomaly, scale_thresholds(manifest.residual, factor), voxel_ml)[0]


def found_volumes(detection: Detection, manifest: Manifest, voxel_ml: float) -> npt.NDArray[np.float64]:
    """Return the volume of the findings in ml at each of `FACTORS`, (41,)."""
    return voxel_ml * np.array([np.count_nonzero(labels) for labels in label_at_factors(detection, manifest, voxel_ml)])


def scale_thresholds(settings: Residual, factor: float) -> Residual:
    """Return the settings with both thresholds multiplied by a factor."""
    scaled = {"threshold": settings.threshold * factor, "extent_threshold": settings.extent_threshold * factor}
    return settings.model_copy(update=scaled)


def conformal_threshold(volumes: npt.NDArray[np.float64], target_ml: float) -> int | None:
    """Return the index of the lowest threshold whose expected false-positive volume is at most a target.

    Conformal risk control (Angelopoulos et al. 2022, arXiv 2208.02814, equation 4): with n exchangeable scans and a
    loss that is bounded by B and does not increase with the threshold, the lowest threshold with
    (sum of losses + B) / (n + 1) <= target keeps the expected loss of a new scan at or below the target. The loss is
    the volume, limited to `LOSS_LIMIT` times the target.

    Parameters
    ----------
    volumes : (n, K) ndarray
        False-positive volume in ml of each scan at each of K ascending thresholds.
    target_ml : float

    Returns
    -------
    int or None
        None if no threshold is high enough.
    """
    limit = LOSS_LIMIT * target_ml
    risk = (np.minimum(volumes, limit).sum(axis=0) + limit) / (len(volumes) + 1)
    reached = np.flatnonzero(risk <= target_ml)
    return int(reached[0]) if len(reached) else None
