"""Synthetic skull-stripped head that can be sampled on any grid.

It is a function of RAS+ millimetres, so all grids show the same head, and the expected values of a resampled image are
known.
"""

import numpy as np
import numpy.typing as npt
from nibabel import affines

from app.volume import Affine, FloatArray, Volume

Points = npt.NDArray[np.float64]

# Half-axes of the head along right-left, anterior-posterior, inferior-superior: 132 x 166 x 118 mm.
HALF_AXES_MM = np.array([66.0, 83.0, 59.0])
EDGE_MM = 1.0
SCAN_UNITS = 800.0
# Fractions of the brightest tissue: grey ribbon, white matter, ventricles.
GREY, WHITE, FLUID = 0.93, 1.00, 0.88
# Wave vectors (per mm) and phases of a fixed texture, about two centimetres across.
WAVES = np.array([[0.31, 0.05, 0.11], [-0.07, 0.27, 0.16], [0.13, -0.19, 0.29], [0.22, 0.24, -0.06]])
PHASES = np.array([0.3, 1.9, 4.1, 5.5])
TEXTURE = 0.02
# Around the brain: dark bone, then scalp, and a face in front and below.
BONE_MM, SCALP_MM = 10.0, 16.0
FACE_MM, FACE_HALF_AXES_MM = np.array([0.0, 62.0, -80.0]), np.array([45.0, 45.0, 45.0])
SCALP = 0.8

# Default lesion.
LESION_MM = (25.0, 10.0, 20.0)
RADIUS_MM = 15.0


def grid(shape: tuple[int, int, int] = (52, 64, 48), spacing: float | tuple[float, float, float] = 3.0) -> Affine:
    """Return an affine along RAS+ whose grid is centred on the origin, (4, 4)."""
    affine = np.diag([*np.broadcast_to(np.asarray(spacing, dtype=np.float64), 3), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def brain(
    shape: tuple[int, int, int] = (52, 64, 48),
    affine: Affine | None = None,
    *,
    centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    scale: float = 1.0,
    texture: float = TEXTURE,
) -> Volume:
    """Sample a brain on a grid: 0 outside, grey ribbon, white matter, two ventricles, fixed texture.

    Parameters
    ----------
    shape : tuple of int
        Voxels along each axis.
    affine : (4, 4) ndarray, optional
        Voxels to RAS+ mm, oblique or not; 3 mm along RAS+, centred, by default.
    centre_mm : tuple of float
        Centre of the brain in RAS+ mm.
    scale : float
        Size relative to an adult brain.
    texture : float
        Amplitude as a fraction of white matter. Without texture the brain is smooth and symmetric.
    """
    affine = grid(shape) if affine is None else affine
    points = (positions(shape, affine) - np.array(centre_mm)) / scale
    return Volume((SCAN_UNITS * _tissue(points, EDGE_MM / scale, texture)).astype(np.float32), affine)


def head(shape: tuple[int, int, int], affine: Affine) -> Volume:
    """Sample the brain with bone, scalp and a face around it."""
    points = positions(shape, affine)
    within_bone, within_scalp = (
        _ellipsoid(points, np.zeros(3), HALF_AXES_MM + wide, EDGE_MM) for wide in (BONE_MM, SCALP_MM)
    )
    face = _ellipsoid(points, FACE_MM, FACE_HALF_AXES_MM, EDGE_MM)
    around = np.maximum(within_scalp, face) * (1 - within_bone)
    return Volume((brain(shape, affine).array + SCAN_UNITS * SCALP * around).astype(np.float32), affine)


def with_lesion(
    volume: Volume, centre_mm: tuple[float, float, float], radius_mm: float = 15.0, factor: float = 1.5
) -> Volume:
    """Copy a scan with the values in a soft-edged ball multiplied by `factor`."""
    distance = np.linalg.norm(positions(volume.shape, volume.affine) - np.array(centre_mm), axis=-1)
    share = _inside(distance - radius_mm, EDGE_MM)
    return Volume((volume.array * (1 + (factor - 1) * share)).astype(np.float32), volume.affine)


def ball(volume: Volume, centre_mm: tuple[float, float, float], radius_mm: float) -> npt.NDArray[np.bool_]:
    """Mark the voxels whose centre lies in a ball: the truth for `with_lesion`."""
    distance = np.linalg.norm(positions(volume.shape, volume.affine) - np.array(centre_mm), axis=-1)
    return np.asarray(distance <= radius_mm)


def positions(shape: tuple[int, int, int], affine: Affine) -> Points:
    """Return the position of every voxel in RAS+ mm, (X, Y, Z, 3)."""
    indices = np.moveaxis(np.indices(shape, dtype=np.float64), 0, -1)
    return np.asarray(affines.apply_affine(affine, indices), dtype=np.float64)


def _tissue(points: Points, edge: float, texture: float) -> FloatArray:
    """Return the tissue, as a fraction of the brightest one, at RAS+ mm from the centre of the head."""
    whole = _ellipsoid(points, np.zeros(3), HALF_AXES_MM, edge)
    white = _ellipsoid(points, np.zeros(3), HALF_AXES_MM - 10, edge)
    left, right = (_ellipsoid(points, np.array([x, 4.0, 6.0]), np.array([7.0, 20.0, 9.0]), edge) for x in (-12, 12))
    value = GREY + (WHITE - GREY) * white + (FLUID - WHITE) * (left + right)
    value = value + texture * np.sin(points @ WAVES.T + PHASES).sum(axis=-1) / 2
    return np.asarray(value * whole, dtype=np.float32)


def _ellipsoid(points: Points, centre: Points, half_axes: Points, edge: float) -> Points:
    """Return 1 inside and 0 outside, with a ramp over the first-order distance to the surface."""
    relative = (points - centre) / half_axes
    radius = np.linalg.norm(relative, axis=-1)
    gradient = np.linalg.norm(relative / half_axes, axis=-1)
    distance = radius * (radius - 1) / np.maximum(gradient, 1e-9)
    return _inside(distance, edge)


def _inside(distance: Points, edge: float) -> Points:
    """Return 1 inside and 0 outside, with a ramp of 2 `edge` between. The background is exactly 0."""
    return np.asarray(np.clip(0.5 - distance / (2 * edge), 0, 1))
