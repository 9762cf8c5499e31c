"""Preprocessing: from a volume to the axial slices that a model was trained on. Training and serving share it.

The axes of the slice grid run along RAS+: slices from inferior to superior, rows from posterior to anterior, columns
from left to right, centred on the foreground. No axis is flipped by name. Both directions use one affine transform of
voxel indices (`app.pipeline.grid`).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy import ndimage

from app.errors import ConstantVoxels, WrongFieldOfView
from app.manifest import HeadBox, Preprocessing
from app.pipeline.grid import SliceGrid, resample_to
from app.pipeline.intracranial import intracranial_mask
from app.volume import Affine, BoolArray, FloatArray, IntArray, Volume

# Scanners mark voxels outside the field of view of a CT by values below air.
AIR_HU = -1000.0
# Dense bone and metal above this value would blur over the thickness of a slice.
MAX_HU = 1000.0
# A larger field contains the trunk. The skull would be searched for in hundreds of megabytes.
MAX_FIELD_MM = (800.0, 800.0, 500.0)
# Pixel size at which the skull is outlined.
SKULL_PIXEL_MM = 1.0
# The foreground starts at this fraction of the 99th percentile. It is far above the interpolation noise of a masked
# background, and below cerebrospinal fluid on T1 (about 0.15).
FOREGROUND_LEVEL = 0.05
# Pixel size at which the box of the head is measured.
BOX_PIXEL_MM = 1.0
# Rows and columns with less than this fraction of the fullest one are outside the box of the head. Ears, the tip of
# the nose or a part of the head-rest would make the box larger.
BOX_FRACTION = 0.25
FWHM_PER_SIGMA = 2.3548
# Ties are common, for example a 2 mm pixel half-way between two 1 mm voxels, or an extent of a whole number of slices.
# The offset breaks them the same way, however the affine was rounded in its file.
TIE = 1e-3


@dataclass(frozen=True, eq=False)
class Slices:
    """Slices of a scan, as a model takes them.

    Attributes
    ----------
    x : (N, 1, H, W) ndarray of float32
        Intensities in [0, 1].
    foreground : (N, H, W) ndarray of bool
        Pixels of the head or brain.
    grid : SliceGrid
        Position of the slices in the scan.
    """

    x: FloatArray
    foreground: BoolArray
    grid: SliceGrid


# ---- slices ------------------------------------------------------------------------------------


def to_slices(volume: Volume, settings: Preprocessing) -> Slices:
    """Resample a scan to the axial slices that a model was trained on.

    Parameters
    ----------
    volume : Volume
        Scan in any orientation.
    settings : Preprocessing
        Settings of the manifest.

    Raises
    ------
    ConstantVoxels
        Nothing in the scan is brighter than its border.
    WrongFieldOfView
        The foreground is larger or smaller than that of any training scan.
    """
    if settings.head_box is not None:
        return _to_slices_of_one_size(volume, settings, settings.head_box)
    if settings.intracranial:
        return _to_intracranial_slices(volume, settings)
    array = volume.array if settings.window is None else np.maximum(volume.array, np.float32(AIR_HU))
    background = background_level(array)
    signal = array - np.float32(background)
    foreground = foreground_mask(signal)
    centre, extent = _bounds_mm(foreground, volume.affine)
    _check_extent(extent, settings)
    affine, shape = _slice_grid(centre, extent, settings.spacing_mm, settings.shape)

    if settings.window is None:
        scale = _percentile_scale(signal[foreground], settings)
    else:
        background, scale, signal = _apply_window(array, settings.window)
    smooth = _anti_alias(signal, volume.spacing, float(np.mean(settings.spacing_mm)))
    x = resample_to(smooth, volume.affine, affine, shape) / np.float32(scale)
    inside = resample_to(foreground.astype(np.float32), volume.affine, affine, shape) > 0.5 + TIE
    x = np.where(inside, np.clip(x, 0, 1), np.float32(0))
    grid = SliceGrid(affine, shape, volume.affine, volume.shape, background, scale)
    return Slices(x[:, None], inside, grid)


def _to_slices_of_one_size(volume: Volume, settings: Preprocessing, box: HeadBox) -> Slices:
    """Resample a scan to slices in which every head has the same size (decision 15)."""
    if settings.window is None:
        background = background_level(volume.array)
        signal = volume.array - np.float32(background)
    else:
        background, scale, signal = _apply_window(volume.array, settings.window)
    # The foreground is found at the resolution of the training images, which do not resolve the skin.
    smooth = _anti_alias(signal, volume.spacing, float(np.mean(settings.spacing_mm)))
    del signal  # 210 MB for a series of 200 slices
    foreground = foreground_mask(smooth, box.foreground_level)
    centre, extent = _bounds_mm(foreground, volume.affine)
    _check_extent(extent, settings)
    solid = foreground.view(np.uint8)
    dz = settings.spacing_mm[0]
    rows, columns = (int(n) for n in np.ceil(extent[1::-1] / BOX_PIXEL_MM) + 3)
    affine, shape = _slice_grid(centre, extent, (dz, BOX_PIXEL_MM, BOX_PIXEL_MM), (rows, columns))
    outline = fill_holes_by_slice(resample_to(solid, volume.affine, affine, shape) > 0.5 + TIE)
    middle, (length, width) = largest_head_box(outline)
    centre = np.array([*affines.apply_affine(affine, [0, *middle])[:2], centre[2]])
    spacing = (dz, length * BOX_PIXEL_MM / box.rows, width * BOX_PIXEL_MM / box.columns)
    affine, shape = _slice_grid(centre, extent, spacing, settings.shape)

    inside = fill_holes_by_slice(resample_to(solid, volume.affine, affine, shape) > 0.5 + TIE)
    values = resample_to(smooth, volume.affine, affine, shape)
    if settings.window is None:
        # Neck and face have other intensities than the brain, and training had no such slices.
        first = _first_slice(shape[0], settings)
        scale = _percentile_scale(values[first:][inside[first:]], settings)
    x = np.where(inside, np.clip(values / np.float32(scale), 0, 1), np.float32(0))
    grid = SliceGrid(affine, shape, volume.affine, volume.shape, background, scale)
    return Slices(x[:, None], inside, grid)


def _to_intracranial_slices(volume: Volume, settings: Preprocessing) -> Slices:
    """Resample a head CT to slices that show only the space inside the skull."""
    assert settings.window is not None, "the manifest has been validated"
    dz = settings.spacing_mm[0]
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in volume.shape])).reshape(3, -1).T
    corners = affines.apply_affine(volume.affine, corners)
    low, high = corners.min(axis=0), corners.max(axis=0)
    _check_field(high - low, settings)

    # The skull is outlined at a finer resolution than the slices have, so the scan is smoothed only along their
    # thickness: each voxel axis to the spacing along its direction.
    fine_mm = (dz, SKULL_PIXEL_MM, SKULL_PIXEL_MM)
    direction = (volume.affine[:3, :3] / volume.spacing) ** 2  # (3 RAS+ axes, 3 voxel axes), columns sum to 1
    hu = np.clip(volume.array, np.float32(AIR_HU), np.float32(MAX_HU))
    smooth = _anti_alias(hu, volume.spacing, np.array(fine_mm[::-1]) @ direction)
    rows, columns = (int(n) for n in np.ceil((high - low)[1::-1] / SKULL_PIXEL_MM) + 1)
    affine, shape = _slice_grid((low + high) / 2, high - low, fine_mm, (rows, columns))
    head = resample_to(smooth - np.float32(AIR_HU), volume.affine, affine, shape) + np.float32(AIR_HU)
    inside = intracranial_mask(head, SKULL_PIXEL_MM)
    if not inside.any():
        raise WrongFieldOfView(
            "No bone encloses a space in any axial slice.",
            expected=f"{settings.subject}.",
            advice=settings.advice,
        )
    centre, extent = _bounds_mm(inside, affine)
    _check_extent(extent, settings)
    low_hu, width = settings.window[0], settings.window[1] - settings.window[0]
    target, target_shape = _slice_grid(centre, extent, settings.spacing_mm, settings.shape)

    def place(values: FloatArray) -> FloatArray:
        smoothed = _anti_alias(values, np.array(fine_mm), np.array(settings.spacing_mm))
        return resample_to(smoothed, affine, target, target_shape)

    # Normalised by the mask, so that neither bone nor air outside changes the values at the edge.
    weight = place(inside.astype(np.float32))
    values = place(np.where(inside, (np.clip(head, *settings.window) - low_hu) / width, np.float32(0)))
    foreground = weight > 0.5 + TIE
    x = np.where(foreground, values / np.maximum(weight, np.float32(TIE)), np.float32(0))
    grid = SliceGrid(target, target_shape, volume.affine, volume.shape, low_hu, width)
    return Slices(np.clip(x, 0, 1)[:, None].astype(np.float32), foreground, grid)


def foreground_cm2(slices: Slices, settings: Preprocessing) -> npt.NDArray[np.float64]:
    """Return the foreground area of each slice in square centimetres, (N,)."""
    _, dy, dx = settings.spacing_mm
    area: npt.NDArray[np.float64] = slices.foreground.sum(axis=(1, 2)) * (dy * dx / 100)
    return area


def analysed_slices(slices: Slices, settings: Preprocessing) -> IntArray:
    """Return the indices of the slices that are analysed, (M,).

    They run from the first to the last slice with enough foreground. A slice between them with less foreground is
    analysed too, so that neighbours in the result are neighbours in the head.

    Raises
    ------
    WrongFieldOfView
        No slice has enough foreground.
    """
    area = foreground_cm2(slices, settings)
    enough = np.flatnonzero(area >= settings.min_foreground_cm2)
    if enough.size == 0:
        raise WrongFieldOfView(
            f"The largest of {len(area)} slices shows {area.max():.0f} cm2.",
            expected=f"slices with at least {settings.min_foreground_cm2:.0f} cm2 of {settings.subject}.",
            advice=settings.advice,
        )
    return np.arange(max(enough[0], _first_slice(len(area), settings)), enough[-1] + 1, dtype=np.int64)


def _first_slice(count: int, settings: Preprocessing) -> int:
    """Return the lowest of `count` slices that is within the height of the training images."""
    if settings.head_box is None or settings.head_box.reach_mm is None:
        return 0
    return max(0, count - 1 - int(settings.head_box.reach_mm / settings.spacing_mm[0] + TIE))


def _slice_grid(
    centre: npt.NDArray[np.float64],
    extent: npt.NDArray[np.float64],
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, int],
) -> tuple[Affine, tuple[int, int, int]]:
    """Return affine and shape of the stack of slices around a centre."""
    dz, dy, dx = spacing_mm
    height, width = shape
    count = int(np.floor(extent[2] / dz + TIE)) + 1
    affine = np.zeros((4, 4))
    affine[0, 2], affine[1, 1], affine[2, 0], affine[3, 3] = dx, dy, dz, 1  # (slice, row, column) -> (z, y, x)
    middle = np.array([(count - 1) / 2, (height - 1) / 2, (width - 1) / 2])
    affine[:3, 3] = centre - affine[:3, :3] @ middle
    return affine, (count, height, width)


# ---- intensities -------------------------------------------------------------------------------


def _percentile_scale(foreground: FloatArray, settings: Preprocessing) -> float:
    """Return the scan units that become 1, from a percentile of the foreground."""
    assert settings.intensity_percentile is not None, "the manifest has been validated"
    assert settings.intensity_level is not None, "the manifest has been validated"
    return float(np.percentile(foreground, settings.intensity_percentile)) / settings.intensity_level


def _apply_window(array: FloatArray, window: tuple[float, float]) -> tuple[float, float, FloatArray]:
    """Clip Hounsfield units to a window.

    The scan is clipped before it is smoothed. Otherwise bone would raise the values of the adjacent brain.

    Returns
    -------
    background, scale : float
        Lower end and width of the window.
    signal : (X, Y, Z) ndarray of float32
        Hounsfield units above the lower end.
    """
    low, high = window
    signal = np.clip(array, np.float32(low), np.float32(high))
    signal -= np.float32(low)
    return low, high - low, signal


def _anti_alias(
    values: FloatArray, spacing: npt.NDArray[np.float64], target: float | npt.NDArray[np.float64]
) -> FloatArray:
    """Smooth an array (3 axes) of one spacing to the resolution of another one before sampling, to prevent aliasing."""
    fwhm_mm = np.sqrt(np.maximum(target**2 - spacing**2, 0))
    sigma = fwhm_mm / FWHM_PER_SIGMA / spacing
    result: FloatArray = ndimage.gaussian_filter(values, sigma, output=np.float32)
    return result


# ---- foreground --------------------------------------------------------------------------------


def background_level(array: FloatArray) -> float:
    """Return the median of the faces of a volume."""
    # Views, because `np.take` copies the whole array for each face if it is in Fortran order, as in NIfTI.
    views = [np.moveaxis(array, axis, 0) for axis in range(3) if array.shape[axis] > 2]
    faces = [view[i].ravel() for view in views for i in (0, -1)]
    return float(np.median(np.concatenate(faces or [array.ravel()])))


def foreground_mask(signal: FloatArray, level: float = FOREGROUND_LEVEL) -> BoolArray:
    """Return the largest connected component above a level, with its holes filled.

    Parameters
    ----------
    signal : (X, Y, Z) ndarray
        Scan minus its background level.
    level : float
        Fraction of the 99th percentile.

    Raises
    ------
    ConstantVoxels
        Nothing is brighter than the background.
    """
    bright = np.percentile(signal, 99)
    if bright <= 0 and (brighter := signal[signal > 0]).size:
        # The head fills less than one percent of the field of view.
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
        # Plane by plane, because numpy counts in a copy of eight bytes per voxel.
        sizes = np.sum([np.bincount(plane.ravel(), minlength=count + 1) for plane in labels], axis=0)
        sizes[0] = 0
        above = labels == sizes.argmax()
    # Nothing lies outside the box, so a hole in the box is a hole in the volume.
    box = bounding_box(above)
    inside = above[box]
    # In a scan of a single slice, holes are filled in its plane. In three dimensions all of them would be open.
    single = tuple(axis for axis, count in enumerate(above.shape) if count == 1)
    above[box] = ndimage.binary_fill_holes(inside.squeeze(single)).reshape(inside.shape)
    return above


def foreground_mask_of(volume: Volume) -> BoolArray:
    """Return the foreground of a scan on its own grid, (X, Y, Z)."""
    return foreground_mask(volume.array - np.float32(background_level(volume.array)))


def bounding_box(mask: BoolArray) -> tuple[slice, slice, slice]:
    """Return the smallest box that contains a mask (X, Y, Z). The box of an empty mask is empty."""
    ends = []
    for others in ((1, 2), (0, 2), (0, 1)):
        at = np.flatnonzero(mask.any(axis=others))
        ends.append(slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0, 0))
    x, y, z = ends
    return x, y, z


def _bounds_mm(foreground: BoolArray, affine: Affine) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return centre and extent of the foreground along the RAS+ axes, each (3,), in millimetres."""
    # Surface voxels are enough, and six times faster than all voxels.
    box = bounding_box(foreground)
    inside = foreground[box]
    shell = inside & ~ndimage.binary_erosion(inside)
    points = affines.apply_affine(affine, np.argwhere(shell) + [side.start for side in box])
    low, high = points.min(axis=0), points.max(axis=0)
    return (low + high) / 2, high - low


def _check_field(field_mm: npt.NDArray[np.float64], settings: Preprocessing) -> None:
    """Raise `WrongFieldOfView` if a scan covers more than a head, along the RAS+ axes (3,)."""
    if (field_mm <= MAX_FIELD_MM).all():
        return
    size = " x ".join(f"{side:.0f}" for side in field_mm)
    limit = " x ".join(f"{side:.0f}" for side in MAX_FIELD_MM)
    raise WrongFieldOfView(
        f"The scan covers {size} mm (right-left, anterior-posterior, inferior-superior).",
        expected=f"{settings.subject} in a field of at most {limit} mm.",
        advice=settings.advice,
    )


def _check_extent(extent: npt.NDArray[np.float64], settings: Preprocessing) -> None:
    """Raise `WrongFieldOfView` if the foreground has the wrong size.

    There is no lower limit along inferior-superior, because a single slice has no extent there.
    """
    low, high = settings.extent_mm
    in_plane = extent[:2]
    too_tall = extent[2] > high[2]
    if not too_tall and all(lo <= e <= hi for lo, e, hi in zip(low, in_plane, high, strict=False)):
        return
    size = " x ".join(f"{e:.0f}" for e in extent)
    raise WrongFieldOfView(
        f"The foreground measures {size} mm (right-left, anterior-posterior, inferior-superior).",
        expected=f"{settings.subject} of {low[0]:.0f} to {high[0]:.0f} by {low[1]:.0f} to {high[1]:.0f} mm, "
        f"at most {high[2]:.0f} mm tall.",
        advice=settings.advice,
    )


# ---- box of the head ---------------------------------------------------------------------------


def fill_holes_by_slice(stack: BoolArray) -> BoolArray:
    """Fill the holes in each slice of (N, H, W) independently."""
    return np.array([ndimage.binary_fill_holes(image) for image in stack], dtype=np.bool_).reshape(stack.shape)


def largest_head_box(stack: BoolArray) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the box around the head in the slice with the largest foreground.

    Parameters
    ----------
    stack : (N, H, W) ndarray of bool
        Foreground, not empty.

    Returns
    -------
    centre, size : tuple of float
        Rows and columns, in pixels.
    """
    largest = stack[stack.sum(axis=(1, 2)).argmax()]
    (top, bottom), (left, right) = _span(largest.sum(axis=1)), _span(largest.sum(axis=0))
    return ((top + bottom) / 2, (left + right) / 2), (bottom - top + 1, right - left + 1)


def _span(filled: IntArray) -> tuple[float, float]:
    """Return the first and last row or column with enough foreground."""
    lines = np.flatnonzero(filled >= BOX_FRACTION * filled.max())
    return float(lines[0]), float(lines[-1])
