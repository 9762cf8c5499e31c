"""Where a stack of slices lies in a scan: one affine transform of voxel indices, there and back."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from nibabel import affines
from scipy import ndimage

from app.volume import Affine, FloatArray

# Linear weights of less than this much known data give no value: NaN instead of a guess.
KNOWN_WEIGHT = 0.5


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

    def to_volume(self, stack: FloatArray) -> FloatArray:
        """Bring values on the slices to the scan's own grid, linearly.

        Parameters
        ----------
        stack : (N, H, W) ndarray
            One value a pixel; NaN where nothing is known.

        Returns
        -------
        (X, Y, Z) ndarray of float32
            NaN outside the slices and where less than half of the weight is known.
        """
        out = np.full(self.source_shape, np.nan, dtype=np.float32)
        box = self._source_box()
        offset = np.array([s.start for s in box], dtype=np.float64)
        to_stack = np.linalg.inv(self.affine) @ self.source_affine
        matrix, translation = to_stack[:3, :3], to_stack[:3, :3] @ offset + to_stack[:3, 3]
        shape = tuple(s.stop - s.start for s in box)
        known = np.isfinite(stack)

        def resample(values: FloatArray) -> FloatArray:
            # One pixel of zeros around the stack: a voxel beyond the outermost slice centres is
            # weighed down, and drops out at half a pixel.
            padded = np.pad(values, 1)
            result: FloatArray = ndimage.affine_transform(
                padded, matrix, translation + 1, output_shape=shape, order=1, output=np.float32
            )
            return result

        with ThreadPoolExecutor(2) as pool:  # scipy lets go of the interpreter's lock
            values, weight = pool.map(resample, (np.where(known, stack, np.float32(0)), known.astype(np.float32)))
        np.divide(values, weight, out=out[box], where=weight >= KNOWN_WEIGHT)
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


def onto(array: FloatArray, affine: Affine, target: Affine, shape: tuple[int, int, int]) -> FloatArray:
    """Sample an array linearly on another grid; 0 outside."""
    to_source = np.linalg.inv(affine) @ target
    result: FloatArray = ndimage.affine_transform(
        array, to_source[:3, :3], to_source[:3, 3], output_shape=shape, order=1, output=np.float32, mode="grid-constant"
    )
    return result
