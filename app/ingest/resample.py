"""Slices at uneven distances, or stacked askew -> a regular volume; only where the caller chose it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.errors import InvalidGeometry
from app.ingest.plane import Plane
from app.ingest.stack import affine_of
from app.volume import Affine, FloatArray

Numbers = npt.NDArray[np.float64]

# The new distance of slices: one in ten of the old ones may be smaller (where two ranges meet, say).
SPACING_PERCENTILE = 10
# No gantry leans so far: the numbers must be wrong, and the canvas would be mostly empty.
MOST_CANVAS = 4
# Extents are a whole number of distances, however their decimals were cut.
TIE = 1e-3


@dataclass(frozen=True, eq=False)
class Target:
    """A regular grid around irregular slices.

    Attributes
    ----------
    shape : tuple of int
        (columns, rows, slices).
    affine : (4, 4) ndarray
        Its indices to RAS+ mm.
    corner : (2,) ndarray of int
        Column and row of its first pixel, counted in the first slice.
    shifts : (N, 2) ndarray
        Columns and rows by which each slice is shifted against the first.
    distances : (N,) ndarray
        Millimetres of each slice from the first, along the normal.
    spacing : float
        Millimetres between the new slices.
    """

    shape: tuple[int, int, int]
    affine: Affine
    corner: npt.NDArray[np.int64]
    shifts: Numbers
    distances: Numbers
    spacing: float

    @property
    def note(self) -> str:
        """What was done, for the report."""
        gap = float(np.diff(self.distances).max())
        return (
            f"Resampled by choice (geometry=resample): linearly between neighbouring slices, up to {gap:.1f} mm apart, "
            f"onto {self.shape[2]} slices at a right angle and {self.spacing:.2f} mm apart."
        )


def target(planes: Sequence[Plane], columns: int, rows: int) -> Target:
    """The grid that holds every pixel of a stack.

    Parameters
    ----------
    planes : sequence of Plane
        At least two, of one orientation, in the order of their normal, no two at one place.
    columns, rows : int
        Of each slice.

    Raises
    ------
    InvalidGeometry
        The stack leans so far that its grid would be mostly empty.
    """
    first = planes[0]
    across, down = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    between_rows, between_columns = first.spacing
    offsets = np.array([plane.position for plane in planes]) - np.array(first.position)  # (N, 3) mm
    shifts = np.stack([offsets @ across / between_columns, offsets @ down / between_rows], axis=1)
    distances = offsets @ np.cross(across, down)
    low, high = np.floor(shifts.min(axis=0) + TIE), np.ceil(shifts.max(axis=0) - TIE)
    if ((high - low) > (MOST_CANVAS - 1) * np.array([columns, rows])).any():
        raise InvalidGeometry(
            "The slices are shifted against each other by several times their own width.",
            expected="slices of one head.",
            advice="Check the ImagePositionPatient of the series.",
        )
    spacing = float(np.percentile(np.diff(distances), SPACING_PERCENTILE, method="higher"))
    count = int(distances[-1] / spacing + TIE) + 1
    corner = np.array(first.position) + low[0] * between_columns * across + low[1] * between_rows * down
    placed = replace(first, position=tuple(corner))
    width, height = (np.array([columns, rows]) + high - low).astype(int)
    shape = (int(width), int(height), count)
    return Target(shape, affine_of(placed, spacing), low.astype(np.int64), shifts, distances, spacing)


def resample(stack: FloatArray, onto: Target) -> FloatArray:
    """Bring a stack onto its grid, linearly.

    Parameters
    ----------
    stack : (columns, rows, N) ndarray
        In the order of the planes that `onto` was made from.
    onto : Target

    Returns
    -------
    ndarray of float32
        Of the target's shape; the smallest value of the stack where no slice reaches.
    """
    background = float(stack.min())

    def upright(k: int) -> FloatArray:
        """A slice where it belongs on the canvas, (width, height)."""
        offset = onto.corner - onto.shifts[k]
        result: FloatArray = ndimage.affine_transform(
            stack[:, :, k], np.ones(2), offset, onto.shape[:2], order=1, cval=background, output=np.float32
        )
        return result

    out = np.empty(onto.shape, dtype=np.float32)
    below, pair = -1, (out[..., 0], out[..., 0])
    for k in range(onto.shape[2]):
        z = k * onto.spacing
        at = min(int(np.searchsorted(onto.distances, z, side="right")) - 1, len(onto.distances) - 2)
        if at != below:
            below, pair = at, (upright(at), upright(at + 1))
        share = (z - onto.distances[at]) / (onto.distances[at + 1] - onto.distances[at])
        out[..., k] = (1 - share) * pair[0] + share * pair[1]
    return out
