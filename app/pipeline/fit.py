"""How large a head is in its planes: what a model of pictures without millimetres goes by."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

BoolArray = npt.NDArray[np.bool_]

# Rows and columns that hold less than this share of the fullest one are beside the box: ears, a tip of
# the nose and a piece of the head-rest must not make a head smaller.
BOX_SHARE = 0.25


def fill_by_slice(stack: BoolArray) -> BoolArray:
    """Holes closed in each slice of (N, H, W): a picture knows nothing of its neighbours."""
    return np.array([ndimage.binary_fill_holes(image) for image in stack], dtype=np.bool_).reshape(stack.shape)


def largest_box(stack: BoolArray) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centre and size (rows, columns) of the box around the slice that shows most, in pixels.

    Parameters
    ----------
    stack : (N, H, W) ndarray of bool
        The head, not empty.
    """
    largest = stack[stack.sum(axis=(1, 2)).argmax()]
    (top, bottom), (left, right) = _span(largest.sum(axis=1)), _span(largest.sum(axis=0))
    return ((top + bottom) / 2, (left + right) / 2), (bottom - top + 1, right - left + 1)


def _span(filled: npt.NDArray[np.int64]) -> tuple[float, float]:
    """First and last line that is filled enough."""
    lines = np.flatnonzero(filled >= BOX_SHARE * filled.max())
    return float(lines[0]), float(lines[-1])
