"""A synthetic lesion in a healthy scan: one function for the sample, the ablation and the evaluation."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.pipeline.prepare import BoolArray
from app.volume import FloatArray

# The edge is smoothed over about so much: two standard deviations.
EDGE_MM = 1.0
# The brain's robust range lies between these percentiles.
ROBUST = (2, 98)


def insert_lesion(
    array: FloatArray, brain: BoolArray, shape: FloatArray, spacing_mm: npt.NDArray[np.float64], contrast: float
) -> tuple[FloatArray, BoolArray]:
    """Change the intensity of a healthy scan under a shape, inside the brain alone.

    Parameters
    ----------
    array : (X, Y, Z) ndarray
        The scan; air is 0.
    brain : (X, Y, Z) ndarray of bool
    shape : (X, Y, Z) ndarray
        1 in the lesion, 0 beside it, on the scan's grid; its edge is smoothed here.
    spacing_mm : (3,) ndarray
        Of the scan.
    contrast : float
        c: how far the intensity is moved, as a share of the brain's robust range; negative darkens.

    Returns
    -------
    (X, Y, Z) ndarray, (X, Y, Z) ndarray of bool
        The scan with the lesion, and the truth: where the change exceeds half of its full size.
    """
    soft = ndimage.gaussian_filter(shape, EDGE_MM / 2 / spacing_mm) * brain
    low, high = np.percentile(array[brain], ROBUST)
    changed = np.where(brain, np.maximum(array + contrast * (high - low) * soft, 0), array).astype(np.float32)
    return changed, soft > 0.5
