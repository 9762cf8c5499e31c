"""Volume -> the slices a model knows, and the way back. Training and serving share it.

The canonical grid has its axes along RAS+: slices run from inferior to superior, rows from
posterior to anterior, columns from left to right, centred on the foreground. No axis is flipped
by name anywhere: both ways are one affine transform of voxel indices.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy import ndimage

from app.errors import WrongFieldOfView
from app.manifest import Fit, Preparation
from app.pipeline.fit import fill_by_slice, largest_box
from app.pipeline.foreground import background_of, bounding_box, stands_out
from app.pipeline.placement import Placement, onto
from app.volume import Affine, FloatArray, Volume

BoolArray = npt.NDArray[np.bool_]

# Nothing is thinner than air: what a CT holds below it marks the outside of its field of view.
AIR_HU = -1000.0
# The head's box is measured on pixels of this size.
FIT_MM = 1.0
FWHM_PER_SIGMA = 2.3548
# Ties are common (a 2 mm pixel half-way between 1 mm voxels, an extent of a whole number of slices)
# and must fall the same way however the affine was rounded on its way through a file.
TIE = 1e-3


@dataclass(frozen=True, eq=False)
class Slices:
    """What a model sees of a scan.

    Attributes
    ----------
    x : (N, 1, H, W) ndarray of float32
        Intensities in [0, 1].
    foreground : (N, H, W) ndarray of bool
        Where there is a head (or a brain) to judge.
    placement : Placement
        Where the slices lie, and the way back.
    """

    x: FloatArray
    foreground: BoolArray
    placement: Placement


def to_slices(volume: Volume, preparation: Preparation) -> Slices:
    """Turn a scan into the axial slices that a model was trained on.

    Parameters
    ----------
    volume : Volume
        The scan, any orientation.
    preparation : Preparation
        The manifest's settings: spacing, slice shape, intensity mapping (by a percentile of the foreground,
        or by a window of Hounsfield units), and whether every head is stretched to one size.

    Raises
    ------
    ConstantVoxels
        Nothing stands out from the background.
    WrongFieldOfView
        What stands out is larger or smaller than anything the model was trained on.
    """
    if preparation.fit is not None:
        return _fitted(volume, preparation, preparation.fit)
    array = volume.array if preparation.window is None else np.maximum(volume.array, np.float32(AIR_HU))
    background = background_of(array)
    signal = array - np.float32(background)
    foreground = stands_out(signal)
    centre, extent = _bounds_mm(foreground, volume.affine)
    _check_extent(extent, preparation)
    affine, shape = _grid(centre, extent, preparation.spacing_mm, preparation.shape)

    if preparation.window is None:
        scale = _scale(signal[foreground], preparation)
    else:
        background, scale, signal = _windowed(array, preparation.window)
    smooth = _anti_alias(signal, volume.spacing, preparation)
    x = onto(smooth, volume.affine, affine, shape) / np.float32(scale)
    inside = onto(foreground.astype(np.float32), volume.affine, affine, shape) > 0.5 + TIE
    x = np.where(inside, np.clip(x, 0, 1), np.float32(0))
    placement = Placement(affine, shape, volume.affine, volume.shape, background, scale)
    return Slices(x[:, None], inside, placement)


def _fitted(volume: Volume, preparation: Preparation, fit: Fit) -> Slices:
    """The same for a model of pictures without millimetres: the head gets the size that theirs have."""
    if preparation.window is None:
        background = background_of(volume.array)
        signal = volume.array - np.float32(background)
    else:
        background, scale, signal = _windowed(volume.array, preparation.window)
    # At the pictures' own resolution, skin is no line of its own around the skull.
    smooth = _anti_alias(signal, volume.spacing, preparation)
    del signal  # of a series of 200 slices, 210 MB
    foreground = stands_out(smooth, fit.foreground_level)
    centre, extent = _bounds_mm(foreground, volume.affine)
    _check_extent(extent, preparation)
    solid = foreground.view(np.uint8)
    dz = preparation.spacing_mm[0]
    rows, columns = (int(n) for n in np.ceil(extent[1::-1] / FIT_MM) + 3)
    affine, shape = _grid(centre, extent, (dz, FIT_MM, FIT_MM), (rows, columns))
    middle, (length, width) = largest_box(fill_by_slice(onto(solid, volume.affine, affine, shape) > 0.5 + TIE))
    centre = np.array([*affines.apply_affine(affine, [0, *middle])[:2], centre[2]])
    spacing = (dz, length * FIT_MM / fit.rows, width * FIT_MM / fit.columns)
    affine, shape = _grid(centre, extent, spacing, preparation.shape)

    inside = fill_by_slice(onto(solid, volume.affine, affine, shape) > 0.5 + TIE)
    seen = onto(smooth, volume.affine, affine, shape)
    if preparation.window is None:
        # Of what the pictures show: neck and face are darker than a brain, or brighter.
        lowest = _lowest(shape[0], preparation)
        scale = _scale(seen[lowest:][inside[lowest:]], preparation)
    x = np.where(inside, np.clip(seen / np.float32(scale), 0, 1), np.float32(0))
    return Slices(x[:, None], inside, Placement(affine, shape, volume.affine, volume.shape, background, scale))


def _scale(foreground: FloatArray, preparation: Preparation) -> float:
    """Scan units that become one, by a percentile of the foreground."""
    assert preparation.intensity_percentile is not None, "the manifest has been validated"
    assert preparation.intensity_level is not None, "the manifest has been validated"
    return float(np.percentile(foreground, preparation.intensity_percentile)) / preparation.intensity_level


def _windowed(array: FloatArray, window: tuple[float, float]) -> tuple[float, float, FloatArray]:
    """What becomes zero, how much more becomes one, and the difference from zero.

    Cut before it is smoothed: bone would shine into the brain beside it.
    """
    low, high = window
    shown = np.clip(array, np.float32(low), np.float32(high))
    shown -= np.float32(low)
    return low, high - low, shown


def foreground_of(volume: Volume) -> BoolArray:
    """What stands out from the background of a scan, on its own grid, (X, Y, Z)."""
    return stands_out(volume.array - np.float32(background_of(volume.array)))


def foreground_cm2(slices: Slices, preparation: Preparation) -> npt.NDArray[np.float64]:
    """Foreground of each slice in square centimetres, (N,)."""
    _, dy, dx = preparation.spacing_mm
    area: npt.NDArray[np.float64] = slices.foreground.sum(axis=(1, 2)) * (dy * dx / 100)
    return area


def analysed_slices(slices: Slices, preparation: Preparation) -> npt.NDArray[np.int64]:
    """Indices of the slices that are judged, (K,): from the first to the last with enough foreground.

    A slice between them that shows less is judged too, so that neighbours in the result are
    neighbours in the head.

    Raises
    ------
    WrongFieldOfView
        No slice shows enough of what the model knows.
    """
    area = foreground_cm2(slices, preparation)
    enough = np.flatnonzero(area >= preparation.min_foreground_cm2)
    if enough.size == 0:
        raise WrongFieldOfView(
            f"The largest of {len(area)} slices shows {area.max():.0f} cm2.",
            expected=f"slices with at least {preparation.min_foreground_cm2:.0f} cm2 of {preparation.subject}.",
            advice=preparation.advice,
        )
    return np.arange(max(enough[0], _lowest(len(area), preparation)), enough[-1] + 1, dtype=np.int64)


def _lowest(count: int, preparation: Preparation) -> int:
    """The first slice that a fitted model has seen the like of, counted from the top of the head."""
    if preparation.fit is None or preparation.fit.reach_mm is None:
        return 0
    return max(0, count - 1 - int(preparation.fit.reach_mm / preparation.spacing_mm[0] + TIE))


def _bounds_mm(foreground: BoolArray, affine: Affine) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Centre and extent of the foreground along RAS+ axes, each (3,), in millimetres."""
    # A surface voxel is enough on each line, and six times cheaper than all of them.
    box = bounding_box(foreground)
    inside = foreground[box]
    shell = inside & ~ndimage.binary_erosion(inside)
    points = affines.apply_affine(affine, np.argwhere(shell) + [side.start for side in box])
    low, high = points.min(axis=0), points.max(axis=0)
    return (low + high) / 2, high - low


def _check_extent(extent: npt.NDArray[np.float64], preparation: Preparation) -> None:
    """A single slice has no extent across it: only what can be measured is judged."""
    low, high = preparation.extent_mm
    measured = extent[:2]
    tall = extent[2] > high[2]
    if not tall and all(lo <= e <= hi for lo, e, hi in zip(low, measured, high, strict=False)):
        return
    size = " x ".join(f"{e:.0f}" for e in extent)
    raise WrongFieldOfView(
        f"What stands out from the background measures {size} mm (right-left, anterior-posterior, inferior-superior).",
        expected=f"{preparation.subject} of {low[0]:.0f} to {high[0]:.0f} by {low[1]:.0f} to {high[1]:.0f} mm, "
        f"at most {high[2]:.0f} mm tall.",
        advice=preparation.advice,
    )


def _grid(
    centre: npt.NDArray[np.float64],
    extent: npt.NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, int],
) -> tuple[Affine, tuple[int, int, int]]:
    """Affine and shape of the canonical stack around a centre."""
    dz, dy, dx = spacing_mm
    height, width = shape
    count = int(np.floor(extent[2] / dz + TIE)) + 1
    affine = np.zeros((4, 4))
    affine[0, 2], affine[1, 1], affine[2, 0], affine[3, 3] = dx, dy, dz, 1  # (slice, row, column) -> (z, y, x)
    middle = np.array([(count - 1) / 2, (height - 1) / 2, (width - 1) / 2])
    affine[:3, 3] = centre - affine[:3, :3] @ middle
    return affine, (count, height, width)


def _anti_alias(signal: FloatArray, spacing: npt.NDArray[np.float64], preparation: Preparation) -> FloatArray:
    """Smooth to the target's resolution before sampling it, so that fine texture does not fold."""
    target = float(np.mean(preparation.spacing_mm))
    fwhm_mm = np.sqrt(np.maximum(target**2 - spacing**2, 0))
    sigma = fwhm_mm / FWHM_PER_SIGMA / spacing
    result: FloatArray = ndimage.gaussian_filter(signal, sigma, output=np.float32)
    return result
