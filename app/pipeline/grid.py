"""Grid of a stack of slices in a scan: one affine transform of voxel indices for both directions."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy import ndimage

from app.volume import Affine, FloatArray

# Smallest sum of interpolation weights over known pixels. Below it the result is NaN instead of a guess.
MIN_KNOWN_WEIGHT = 0.5
# Largest tilt between two parallel axes. With this tilt no pixel moves by a hundredth over the longest scan.
MAX_AXIS_TILT = 1e-5
# Number of voxels that are resampled together.
SLAB_VOXELS = 1_000_000
# A slab takes about a dozen megabytes. More threads would save a tenth of a second on a large machine.
MAX_THREADS = 4

# Interpolator: rows of the first axis of the scan -> values there, (rows, Y, Z).
Slab = Callable[[slice], FloatArray]


@dataclass(frozen=True, eq=False)
class SliceGrid:
    """Position of a stack of slices in its scan.

    Attributes
    ----------
    affine : (4, 4) ndarray
        Indices (slice, row, column) of the stack to RAS+ mm.
    shape : tuple of int
        (N, H, W) of the stack.
    source_affine : (4, 4) ndarray
        Voxel indices of the scan to RAS+ mm.
    source_shape : tuple of int
        (X, Y, Z) of the scan.
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
        """Resample a stack linearly to the grid of the scan.

        Parameters
        ----------
        stack : (N, H, W) ndarray
            One value per pixel. NaN means unknown.
        threads : int
            Number of threads for a scan that is oblique to the slices. 0 takes the available cores, at most
            `MAX_THREADS`. The values do not depend on it.

        Returns
        -------
        (X, Y, Z) ndarray of float32
            NaN outside the slices, and in voxels with less than half of their weight on valid pixels.
        """
        out = np.full(self.source_shape, np.nan, dtype=np.float32)
        box = self._source_box()
        to_stack = np.linalg.inv(self.affine) @ self.source_affine
        start = affines.apply_affine(to_stack, [s.start for s in box])
        shape = tuple(s.stop - s.start for s in box)
        known = np.isfinite(stack)
        aligned = _axes_aligned(to_stack[:3, :3])
        interpolate = _interpolate_aligned if aligned else _interpolate_oblique
        values, weight = (
            interpolate(part, to_stack[:3, :3], start, shape)
            for part in (np.where(known, stack, np.float32(0)), known.astype(np.float32))
        )

        def fill(rows: slice) -> None:
            total = weight(rows)
            np.divide(values(rows), total, out=out[box][rows], where=total >= MIN_KNOWN_WEIGHT)

        # A matrix product uses every core already. scipy releases the interpreter lock, so threads help there.
        workers = 1 if aligned else threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, _slabs(shape)))
        return out

    def sample_volume(self, array: FloatArray) -> FloatArray:
        """Sample an array on the grid of the scan linearly at the pixels, (X, Y, Z) -> (N, H, W). 0 outside."""
        return resample_to(array, self.source_affine, self.affine, self.shape)

    def _source_box(self) -> tuple[slice, slice, slice]:
        """Return the part of the scan that the stack can reach."""
        corners = np.array(np.meshgrid(*[(-1.0, n) for n in self.shape], indexing="ij")).reshape(3, -1).T
        to_source = np.linalg.inv(self.source_affine) @ self.affine
        reached = affines.apply_affine(to_source, corners)
        low = np.clip(np.floor(reached.min(axis=0)), 0, self.source_shape).astype(int)
        high = np.clip(np.ceil(reached.max(axis=0)) + 1, 0, self.source_shape).astype(int)
        x, y, z = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        return x, y, z


def resample_to(
    array: FloatArray | npt.NDArray[np.uint8], affine: Affine, target: Affine, shape: tuple[int, int, int]
) -> FloatArray:
    """Resample an array linearly to another grid. Values outside the array are 0.

    Parameters
    ----------
    array : (I, J, K) ndarray
    affine : (4, 4) ndarray
        Indices of the array to RAS+ mm.
    target : (4, 4) ndarray
        Indices of the result to RAS+ mm.
    shape : tuple of int
        Shape of the result.
    """
    to_source = np.linalg.inv(affine) @ target
    result: FloatArray = ndimage.affine_transform(
        array, to_source[:3, :3], to_source[:3, 3], output_shape=shape, order=1, output=np.float32, mode="grid-constant"
    )
    return result


def _slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Split the first axis, so that intermediate arrays of the size of the scan are never needed."""
    rows = max(1, SLAB_VOXELS // max(1, shape[1] * shape[2]))
    return (slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows))


def _axes_aligned(matrix: Affine) -> bool:
    """Return True if each axis of one grid runs along one axis of the other, as in most scans."""
    steps = np.abs(matrix)
    return bool((steps > MAX_AXIS_TILT * steps.max(axis=0)).sum() == len(matrix))


def _interpolate_aligned(stack: FloatArray, matrix: Affine, start: Affine, shape: tuple[int, ...]) -> Slab:
    """Interpolate linearly axis by axis, each axis by a matrix product. 0 beyond the stack."""
    axes = np.abs(matrix).argmax(axis=0)  # of the stack, along the axes of the scan
    x, y, z = (
        _interpolation_matrix(matrix[axis, i] * np.arange(n) + start[axis], stack.shape[axis])
        for i, (axis, n) in enumerate(zip(axes, shape, strict=True))
    )
    partial = (y @ (stack.transpose(axes) @ z.T)).reshape(len(x.T), -1)  # (columns, Y Z)
    return lambda rows: (x[rows] @ partial).reshape(-1, *shape[1:])


def _interpolation_matrix(at: Affine, count: int) -> FloatArray:
    """Return the weights of `count` samples at each position, (positions, count).

    Beyond the outermost samples the weights of a position sum to less than 1.
    """
    return np.asarray(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(count))), dtype=np.float32)


def _interpolate_oblique(stack: FloatArray, matrix: Affine, start: Affine, shape: tuple[int, ...]) -> Slab:
    """Interpolate linearly for a scan that is oblique to the slices."""
    # With one pixel of zeros around the stack, the weight falls beyond the outermost slice centres and drops below
    # `MIN_KNOWN_WEIGHT` after half a pixel.
    padded = np.pad(stack, 1)

    def interpolate(rows: slice) -> FloatArray:
        size = (rows.stop - rows.start, *shape[1:])
        offset = start + matrix[:, 0] * rows.start + 1
        result: FloatArray = ndimage.affine_transform(
            padded, matrix, offset, output_shape=size, order=1, output=np.float32
        )
        return result

    return interpolate
