"""Synthetic lesion in a healthy scan: one function for the sample, the ablation and the evaluation."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.volume import BoolArray, FloatArray

# Width of the smoothed edge: two standard deviations.
EDGE_MM = 1.0
# Percentiles between which the robust intensity range of the brain lies.
ROBUST_PERCENTILES = (2, 98)


def insert_lesion(
    array: FloatArray, brain: BoolArray, shape: FloatArray, spacing_mm: npt.NDArray[np.float64], contrast: float
) -> tuple[FloatArray, BoolArray]:
    """Change the intensity of a healthy scan under a shape (docs/method.md, "Synthetic lesions").

    Only the brain is changed.

    Parameters
    ----------
    array : (X, Y, Z) ndarray
        Scan, 0 in air.
    brain : (X, Y, Z) ndarray of bool
    shape : (X, Y, Z) ndarray
        1 in the lesion, 0 outside, on the grid of the scan. Its edge is smoothed here.
    spacing_mm : (3,) ndarray
        Voxel size of the scan.
    contrast : float
        Change of intensity as a fraction of the robust range of the brain. A negative one darkens.

    Returns
    -------
    scan : (X, Y, Z) ndarray of float32
    truth : (X, Y, Z) ndarray of bool
        Voxels whose change exceeds half of the full change.
    """
    smoothed_shape = ndimage.gaussian_filter(shape, EDGE_MM / 2 / spacing_mm) * brain
    low, high = np.percentile(array[brain], ROBUST_PERCENTILES)
    changed = np.where(brain, np.maximum(array + contrast * (high - low) * smoothed_shape, 0), array).astype(np.float32)
    return changed, smoothed_shape > 0.5
