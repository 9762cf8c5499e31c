"""Affines, and volumes whose every voxel can be followed, for tests of geometry."""

import itertools
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import affines, orientations

from app.volume import Affine, Volume

# All 48 ways to store three axes: permutations and flips, as nibabel's orientation arrays.
LAYOUTS = [
    np.column_stack([axes, flips])
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]
STRAIGHT, OBLIQUE = (0.0, 0.0, 0.0), (0.2, -0.35, 0.5)
ANGLES = {"straight": STRAIGHT, "oblique": OBLIQUE}
SPACING = (0.9, 1.1, 2.0)


def make_affine(spacing: tuple[float, float, float], angles: tuple[float, float, float] = STRAIGHT) -> Affine:
    """Return the affine of a grid rotated by Euler angles in radians, with an origin that is not round."""
    affine = np.eye(4)
    for axis, angle in enumerate(angles):
        rotation = np.eye(3)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        rotation[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        affine[:3, :3] = rotation @ affine[:3, :3]
    affine[:3, :3] = affine[:3, :3] * spacing
    affine[:3, 3] = -17.25, 31.5, -42.125
    return affine


def make_layout(layout: Any, angles: tuple[float, float, float]) -> Volume:
    """Return a volume of distinct whole numbers, stored along the axes of a layout.

    The three axes have different lengths.
    """
    shape = (11, 13, 12)
    array = np.random.default_rng(3).permutation(int(np.prod(shape))).reshape(shape).astype(np.float32)
    affine = make_affine(SPACING, angles) @ orientations.inv_ornt_aff(layout, shape)
    return Volume(np.ascontiguousarray(orientations.apply_orientation(array, layout)), affine)


def voxel_positions(volume: Volume) -> Affine:
    """Return the position of each voxel in RAS+ mm, in the order of the voxel values, (V, 3)."""
    order = np.argsort(volume.array, axis=None)
    index = np.stack(np.unravel_index(order, volume.shape), axis=1)
    return np.asarray(affines.apply_affine(volume.affine, index))


def layout_name(layout: Any) -> str:
    """Return the axis codes of a layout, for example "RAS"."""
    return "".join(nib.orientations.ornt2axcodes(layout))
