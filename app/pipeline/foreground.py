"""What stands out from the background of a scan, on its own grid."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.errors import ConstantVoxels
from app.volume import FloatArray

Mask = npt.NDArray[np.bool_]

# Foreground starts at this share of the brightest one percent: far above the interpolation noise
# of a masked background, below cerebrospinal fluid on T1 (about 0.15).
FOREGROUND_LEVEL = 0.05


def background_of(array: FloatArray) -> float:
    """The value of nothing: the median of the volume's faces."""
    # Views: `np.take` copies the whole of an array that lies in Fortran's order, as NIfTI's do, for each face.
    views = [np.moveaxis(array, axis, 0) for axis in range(3) if array.shape[axis] > 2]
    faces = [view[i].ravel() for view in views for i in (0, -1)]
    return float(np.median(np.concatenate(faces or [array.ravel()])))


def stands_out(signal: FloatArray, level: float = FOREGROUND_LEVEL) -> Mask:
    """The largest connected thing above this share of the brightest one percent, holes filled, (X, Y, Z)."""
    bright = np.percentile(signal, 99)
    if bright <= 0 and (brighter := signal[signal > 0]).size:
        # A head smaller than one percent of the field of view: the brightest of what is there.
        bright = np.percentile(brighter, 99)
    if bright <= 0:
        raise ConstantVoxels(
            "Nothing in the image is brighter than its border.",
            expected="a head or brain on a darker background.",
            advice="Check the export and its rescale slope and intercept.",
        )
    above = np.greater(signal, level * bright, order="C")
    labels, count = ndimage.label(above)
    if count > 1:
        # Part by part: numpy counts in a copy of eight bytes a voxel.
        sizes = np.sum([np.bincount(part.ravel(), minlength=count + 1) for part in labels], axis=0)
        sizes[0] = 0
        above = labels == sizes.argmax()
    # All around the box is outside: a hole in it is a hole in the whole.
    box = bounding_box(above)
    inside = above[box]
    # A hole in a single slice is closed in its plane: across it, everything is open to the outside.
    single = tuple(axis for axis, count in enumerate(above.shape) if count == 1)
    above[box] = ndimage.binary_fill_holes(inside.squeeze(single)).reshape(inside.shape)
    return above


def bounding_box(mask: Mask) -> tuple[slice, slice, slice]:
    """The smallest box that holds all of a mask, (X, Y, Z); an empty one where it is empty."""
    ends = []
    for others in ((1, 2), (0, 2), (0, 1)):
        at = np.flatnonzero(mask.any(axis=others))
        ends.append(slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0, 0))
    x, y, z = ends
    return x, y, z
