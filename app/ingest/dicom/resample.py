"""Resample slices that are tilted or unevenly spaced onto a regular grid, if the caller chose that."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from app.errors import InvalidGeometry
from app.ingest.dicom.geometry import Float64Array, IntArray, Plane, affine_from_plane
from app.volume import Affine, FloatArray

# The new slice spacing. One in ten of the old distances may be smaller, for example where two ranges meet.
SPACING_PERCENTILE = 10
# A real gantry tilt never needs a larger grid than this multiple of the slice: the positions must be wrong.
MAX_GRID_FACTOR = 4
# Tolerance with which an extent is a whole number of distances, because positions are rounded decimals.
ROUNDING_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class RegularGrid:
    """Regular grid around irregular slices.

    Attributes
    ----------
    shape : tuple of int
        (columns, rows, slices).
    affine : (4, 4) ndarray
        Indices of the grid to RAS+ mm.
    corner : (2,) ndarray of int
        Column and row of the grid's first pixel, in pixels of the first slice.
    shifts : (N, 2) ndarray
        Columns and rows by which each slice is shifted against the first.
    distances : (N,) ndarray
        Distance of each slice from the first along the normal, in mm.
    spacing : float
        Distance between the slices of the grid, in mm.
    """

    shape: tuple[int, int, int]
    affine: Affine
    corner: IntArray
    shifts: Float64Array
    distances: Float64Array
    spacing: float

    @property
    def note(self) -> str:
        """Sentence for the report that describes the resampling."""
        gap = float(np.diff(self.distances).max())
        return (
            f"The slices were resampled as requested (geometry=resample), by linear interpolation between neighbours "
            f"up to {gap:.1f} mm apart, onto {self.shape[2]} regular slices with a spacing of {self.spacing:.2f} mm."
        )


def plan_grid(planes: Sequence[Plane], columns: int, rows: int) -> RegularGrid:
    """Return the smallest regular grid that covers all slices.

    Parameters
    ----------
    planes : sequence of Plane
        At least two, of one orientation, in their order along the normal; no two at one position.
    columns, rows : int
        Size of each slice.

    Raises
    ------
    InvalidGeometry
        If the slices are shifted so far against each other that the grid would be mostly empty.
    """
    first = planes[0]
    across, down = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    between_rows, between_columns = first.spacing
    offsets = np.array([plane.position for plane in planes]) - np.array(first.position)  # (N, 3) mm
    shifts = np.stack([offsets @ across / between_columns, offsets @ down / between_rows], axis=1)
    distances = offsets @ np.cross(across, down)
    low = np.floor(shifts.min(axis=0) + ROUNDING_TOLERANCE)
    high = np.ceil(shifts.max(axis=0) - ROUNDING_TOLERANCE)
    if ((high - low) > (MAX_GRID_FACTOR - 1) * np.array([columns, rows])).any():
        raise InvalidGeometry(
            "The slices are shifted sideways against each other by several times their own width.",
            expected="slices of one head.",
            advice="Check the attribute ImagePositionPatient of the series.",
        )
    spacing = float(np.percentile(np.diff(distances), SPACING_PERCENTILE, method="higher"))
    count = int(distances[-1] / spacing + ROUNDING_TOLERANCE) + 1
    corner = np.array(first.position) + low[0] * between_columns * across + low[1] * between_rows * down
    first_of_grid = replace(first, position=tuple(corner))
    width, height = (np.array([columns, rows]) + high - low).astype(int)
    shape = (int(width), int(height), count)
    affine = affine_from_plane(first_of_grid, spacing)
    return RegularGrid(shape, affine, low.astype(np.int64), shifts, distances, spacing)


def resample(stack: FloatArray, grid: RegularGrid) -> FloatArray:
    """Resample a stack onto a regular grid by linear interpolation.

    Parameters
    ----------
    stack : (columns, rows, N) ndarray
        In the order of the planes from which `grid` was planned.
    grid : RegularGrid

    Returns
    -------
    ndarray of float32
        Of the grid's shape. Voxels outside all slices have the smallest value of the stack.
    """
    background = float(stack.min())

    def aligned(k: int) -> FloatArray:
        """Return slice k at its position in the plane of the grid, (width, height)."""
        offset = grid.corner - grid.shifts[k]
        result: FloatArray = ndimage.affine_transform(
            stack[:, :, k], np.ones(2), offset, grid.shape[:2], order=1, cval=background, output=np.float32
        )
        return result

    out = np.empty(grid.shape, dtype=np.float32)
    below, pair = -1, (out[..., 0], out[..., 0])
    for k in range(grid.shape[2]):
        z = k * grid.spacing
        at = min(int(np.searchsorted(grid.distances, z, side="right")) - 1, len(grid.distances) - 2)
        if at != below:
            below, pair = at, (aligned(at), aligned(at + 1))
        weight = (z - grid.distances[at]) / (grid.distances[at + 1] - grid.distances[at])
        out[..., k] = (1 - weight) * pair[0] + weight * pair[1]
    return out
