"""Synthetic lesions of real shapes in healthy scans."""

from dataclasses import dataclass

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy import ndimage

from app.pipeline import lesion
from app.pipeline.prepare import foreground_of
from app.volume import FloatArray, Volume
from training.config import data_root

# Bounds of the skull-stripped brains in the space of the gold masks (mean of patients 07 and 19),
# RAS+ millimetres. A scan's own bounds are mapped on them axis by axis.
SHAPE_BRAIN_MM = ((-64.0, -97.5, -54.0), (64.5, 57.0, 67.5))
# A shape is moved by up to this much before it is inserted: another place for each seed.
JITTER_MM = 4.0


@dataclass(frozen=True, eq=False)
class Lesioned:
    """A healthy scan with a lesion, and the truth about it.

    Attributes
    ----------
    volume : Volume
        The scan, changed.
    truth : (X, Y, Z) ndarray of bool
        Where the change exceeds half of its full size.
    """

    volume: Volume
    truth: npt.NDArray[np.bool_]

    @property
    def truth_ml(self) -> float:
        """Volume of the truth."""
        return float(self.truth.sum()) * self.volume.voxel_ml


def gold_shape(patient: str) -> Volume:
    """Consensus lesion mask of an MS patient, in MNI space (Lesjak et al. 2018)."""
    path = data_root() / "ms_open_ms_data" / "gold_mni" / f"{patient}_gold.nii.gz"
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return Volume((np.asarray(image.dataobj) > 0).astype(np.float32), np.asarray(image.affine))


def insert_lesion(volume: Volume, shape: Volume, contrast: float, seed: int) -> Lesioned:
    """Change the intensity of a healthy scan under a lesion's shape.

    Parameters
    ----------
    volume : Volume
        A healthy, skull-stripped scan.
    shape : Volume
        A binary mask in MNI space.
    contrast : float
        c: how far the intensity is moved, as a share of the brain's robust range (2nd to 98th
        percentile); negative darkens.
    seed : int
        Of the small displacement.
    """
    rng = np.random.default_rng([seed, 7])
    brain = foreground_of(volume)
    placed = _shape_on_scan(volume, brain, shape, rng.uniform(-JITTER_MM, JITTER_MM, 3))
    changed, truth = lesion.insert_lesion(volume.array, brain, placed, volume.spacing, contrast)
    return Lesioned(Volume(changed, volume.affine), truth)


def _shape_on_scan(
    volume: Volume, brain: npt.NDArray[np.bool_], shape: Volume, shift_mm: npt.NDArray[np.float64]
) -> FloatArray:
    """The shape on the scan's grid, (X, Y, Z) in [0, 1]."""
    points = affines.apply_affine(volume.affine, np.argwhere(brain & ~ndimage.binary_erosion(brain)))
    low, high = points.min(axis=0), points.max(axis=0)
    shape_low, shape_high = (np.array(side) for side in SHAPE_BRAIN_MM)
    scale = (shape_high - shape_low) / (high - low)
    to_space = np.eye(4)
    to_space[:3, :3] = np.diag(scale)
    to_space[:3, 3] = shape_low - scale * (low + shift_mm)
    to_shape = np.linalg.inv(shape.affine) @ to_space @ volume.affine
    placed: FloatArray = ndimage.affine_transform(
        shape.array, to_shape[:3, :3], to_shape[:3, 3], output_shape=volume.shape, order=1, output=np.float32
    )
    return placed
