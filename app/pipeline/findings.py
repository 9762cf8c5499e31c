"""Findings in an anomaly map: the connected voxels above two thresholds."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.manifest import Residual
from app.pipeline.preprocess import bounding_box
from app.volume import BoolArray, FloatArray

LabelArray = npt.NDArray[np.integer]


def dice(found: BoolArray, truth: BoolArray) -> float:
    """Return the Dice coefficient 2 |A and B| / (|A| + |B|) of two masks. It is 1 if both are empty."""
    size = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / size if size else 1.0


def label_findings(anomaly: FloatArray, settings: Residual, voxel_ml: float) -> tuple[LabelArray, int]:
    """Label the connected findings in an anomaly map by size (docs/method.md, "Residual").

    Two thresholds are used (hysteresis, Canny 1986). A finding contains a voxel above the higher threshold, and
    extends to all connected voxels above the lower one. The higher threshold by itself would mark only the peak of a
    lesion. Voxels are 26-connected.

    Parameters
    ----------
    anomaly : (X, Y, Z) ndarray
        Anomaly map on any grid. NaN is never part of a finding.
    settings : Residual
        Thresholds and smallest volume.
    voxel_ml : float
        Volume of a voxel of that grid.

    Returns
    -------
    labels : (X, Y, Z) ndarray of uint16 or int32
        1 is the largest finding.
    count : int
    """
    with np.errstate(invalid="ignore"):
        extent = anomaly > settings.extent_threshold
        # Label the box only, because most of a scan is far from any finding.
        box = bounding_box(extent)
        inside, peaks = extent[box], anomaly[box] > settings.threshold
    labels, count = ndimage.label(inside, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    has_peak = np.bincount(labels[peaks], minlength=count + 1) > 0
    keep = has_peak & (sizes * voxel_ml >= settings.min_lesion_ml)
    keep[0] = False
    by_size = [i for i in np.argsort(-sizes, kind="stable") if keep[i]]
    fits_uint16 = len(by_size) <= np.iinfo(np.uint16).max
    dtype = np.dtype(np.uint16 if fits_uint16 else np.int32)
    rank = np.zeros(count + 1, dtype=dtype)
    rank[by_size] = np.arange(1, len(by_size) + 1)
    ranked: LabelArray = np.zeros(anomaly.shape, dtype=dtype)
    ranked[box] = rank[labels]
    return ranked, len(by_size)
