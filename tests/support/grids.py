"""Grids on which tests sample the phantom, and its slices."""

from functools import cache

import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy.spatial.transform import Rotation

from app.pipeline.preprocess import Slices, to_slices
from app.volume import Affine, Volume
from tests.support.bundle import tiny_manifest
from tests.support.phantom import brain, grid

PREPROCESSING = tiny_manifest().preprocessing
# Corner of the stack of `brain()`: 40 slices of 64 x 56 pixels of 3 mm around the origin.
CORNER_MM = (-82.5, -94.5, -58.5)


def tilted(affine: Affine, *degrees: float) -> Affine:
    """Rotate a grid about the origin by degrees about x, y and z."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    return np.asarray(turn @ affine)


# Voxel (i, j, k) of a grid of 56 x 60 x 70 is voxel (59 - j, k, i) of one of 60 x 70 x 56.
MIRRORED = np.array([[0, -1, 0, 59], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
GRIDS = {
    "1.5 mm": ((98, 120, 88), grid((98, 120, 88), 1.5)),
    "thick axial": ((110, 140, 26), grid((110, 140, 26), (1.3, 1.3, 5.0))),
    "thick sagittal": ((34, 140, 106), grid((34, 140, 106), (4.5, 1.3, 1.3))),
    "oblique": ((60, 70, 56), tilted(grid((60, 70, 56)), 10, -15, 20)),
    "oblique, mirrored": ((56, 60, 70), tilted(grid((60, 70, 56)), -8, 12, 25) @ MIRRORED),
}


@cache
def preprocessed(name: str) -> tuple[Volume, Slices]:
    """Sample the phantom on one of `GRIDS` and preprocess it."""
    volume = brain(*GRIDS[name])
    return volume, to_slices(volume, PREPROCESSING)


@cache
def reference() -> tuple[Volume, Slices]:
    """Sample the phantom on its default grid and preprocess it."""
    volume = brain()
    return volume, to_slices(volume, PREPROCESSING)


def centroid_mm(weights: npt.NDArray[np.floating], affine: Affine) -> npt.NDArray[np.float64]:
    """Return the centre of mass in RAS+ mm, (3,)."""
    indices = np.indices(weights.shape).reshape(3, -1)
    return np.asarray(affines.apply_affine(affine, (indices * weights.ravel()).sum(axis=1) / weights.sum()))
