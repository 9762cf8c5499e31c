"""Where a stack of slices lies in a scan: one affine transform of voxel indices, there and back."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy import ndimage

from app.volume import Affine, FloatArray

# Linear weights of less than this much known data give no value: NaN instead of a guess.
KNOWN_WEIGHT = 0.5
# An axis that leans less than this from another's: no pixel moves by a hundredth over the longest scan.
AXIS_TILT = 1e-5
# Voxels that are brought back at once.
SLAB_VOXELS = 1_000_000
# Slabs at once, each a dozen megabytes: more would cost memory on a large machine, for a tenth of a second.
MOST_THREADS = 4

# Rows of the scan's first axis -> values there, (rows, Y, Z).
Slab = Callable[[slice], FloatArray]


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a stack of slices lies, and its own way back to the scan.

    Attributes
    ----------
    affine : (4, 4) ndarray
        Indices (slice, row, column) of the stack to RAS+ millimetres.
    shape : tuple of int
        (N, H, W) of the stack.
    source_affine : (4, 4) ndarray
        Voxel indices of the scan to RAS+ millimetres.
    source_shape : tuple of int
        Shape of the scan.
    background, scale : float
        Scan units = background + scale * slice value.
    """

    affine: Affine
    shape: tuple[int, int, int]
    source_affine: Affine
    source_shape: tuple[int, int, int]
    background: float
    scale: float

    def to_volume(self, stack: FloatArray, threads: int = 0) -> FloatArray:
        """Bring values on the slices to the scan's own grid, linearly.

        Parameters
        ----------
        stack : (N, H, W) ndarray
            One value a pixel; NaN where nothing is known.
        threads : int
            Of a scan whose axes lean against the slices'; 0 takes the cores, up to `MOST_THREADS`. They do not
            change the values.

        Returns
        -------
        (X, Y, Z) ndarray of float32
            NaN outside the slices and where less than half of the weight is known.
        """
        out = np.full(self.source_shape, np.nan, dtype=np.float32)
        box = self._source_box()
        to_stack = np.linalg.inv(self.affine) @ self.source_affine
        start = affines.apply_affine(to_stack, [s.start for s in box])
        shape = tuple(s.stop - s.start for s in box)
        known = np.isfinite(stack)
        straight = _scaled_axes(to_stack[:3, :3])
        resample = _along_axes if straight else _anywhere
        values, weight = (
            resample(part, to_stack[:3, :3], start, shape)
            for part in (np.where(known, stack, np.float32(0)), known.astype(np.float32))
        )

        def bring(rows: slice) -> None:
            shares = weight(rows)
            np.divide(values(rows), shares, out=out[box][rows], where=shares >= KNOWN_WEIGHT)

        # Products of matrices take every core by themselves; scipy lets go of the interpreter's lock.
        several = 1 if straight else threads or min(MOST_THREADS, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(several) as pool:
            list(pool.map(bring, _slabs(shape)))
        return out

    def from_source(self, array: FloatArray) -> FloatArray:
        """Sample an array on the scan's grid linearly on the slices, (X, Y, Z) -> (N, H, W); 0 outside."""
        return onto(array, self.source_affine, self.affine, self.shape)

    def _source_box(self) -> tuple[slice, slice, slice]:
        """The part of the scan's grid that the stack can reach."""
        corners = np.array(np.meshgrid(*[(-1.0, n) for n in self.shape], indexing="ij")).reshape(3, -1).T
        to_source = np.linalg.inv(self.source_affine) @ self.affine
        reached = affines.apply_affine(to_source, corners)
        low = np.clip(np.floor(reached.min(axis=0)), 0, self.source_shape).astype(int)
        high = np.clip(np.ceil(reached.max(axis=0)) + 1, 0, self.source_shape).astype(int)
        x, y, z = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        return x, y, z


def _slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """The first axis in parts: what lies between the stack and the result is never whole in memory."""
    rows = max(1, SLAB_VOXELS // max(1, shape[1] * shape[2]))
    return (slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows))


def _scaled_axes(matrix: Affine) -> bool:
    """Each axis of the one grid runs along one axis of the other, as in most scans."""
    steps = np.abs(matrix)
    return bool((steps > AXIS_TILT * steps.max(axis=0)).sum() == len(matrix))


def _along_axes(stack: FloatArray, matrix: Affine, start: Affine, shape: tuple[int, ...]) -> Slab:
    """Linear interpolation axis by axis, each a product of matrices; 0 beyond the stack."""
    axes = np.abs(matrix).argmax(axis=0)  # of the stack, along the axes of the scan
    x, y, z = (
        _interpolation(matrix[axis, i] * np.arange(n) + start[axis], stack.shape[axis])
        for i, (axis, n) in enumerate(zip(axes, shape, strict=True))
    )
    partly = (y @ (stack.transpose(axes) @ z.T)).reshape(len(x.T), -1)  # (columns, Y Z)
    return lambda rows: (x[rows] @ partly).reshape(-1, *shape[1:])


def _interpolation(at: Affine, count: int) -> FloatArray:
    """Weights of `count` samples at each place, (places, count); less than 1 in all beside the outermost."""
    return np.asarray(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(count))), dtype=np.float32)


def _anywhere(stack: FloatArray, matrix: Affine, start: Affine, shape: tuple[int, ...]) -> Slab:
    """The same for a tilted scan."""
    # One pixel of zeros around the stack: a voxel beyond the outermost slice centres is
    # weighed down, and drops out at half a pixel.
    padded = np.pad(stack, 1)

    def resample(rows: slice) -> FloatArray:
        size = (rows.stop - rows.start, *shape[1:])
        offset = start + matrix[:, 0] * rows.start + 1
        result: FloatArray = ndimage.affine_transform(
            padded, matrix, offset, output_shape=size, order=1, output=np.float32
        )
        return result

    return resample


def onto(
    array: FloatArray | npt.NDArray[np.uint8], affine: Affine, target: Affine, shape: tuple[int, int, int]
) -> FloatArray:
    """Sample an array linearly on another grid; 0 outside."""
    to_source = np.linalg.inv(affine) @ target
    result: FloatArray = ndimage.affine_transform(
        array, to_source[:3, :3], to_source[:3, 3], output_shape=shape, order=1, output=np.float32, mode="grid-constant"
    )
    return result
