"""Synthetic lesions of real shapes in healthy scans."""

from dataclasses import dataclass

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy import ndimage

from app.pipeline import synthetic_lesion
from app.pipeline.preprocess import fill_holes_by_slice, foreground_mask_of
from app.volume import FloatArray, Volume
from training.config import data_root

# Bounds of the skull-stripped brains in the space of the gold masks (mean of patients 07 and 19),
# RAS+ millimetres. A scan's own bounds are mapped on them axis by axis.
SHAPE_BRAIN_MM = ((-64.0, -97.5, -54.0), (64.5, 57.0, 67.5))
# A shape is moved by up to this much before it is inserted: another place for each seed.
JITTER_MM = 4.0
# Of a head in CT, what is brain: soft tissue within the skull, away from bone and air by this much.
SOFT_TISSUE_HU = (5.0, 65.0)
BRAIN_MARGIN = 2
# What is smaller in a picture is no brain: the muscles of the neck, or its last bit under the vertex.
LEAST_BRAIN_CM2 = 50.0
# One sprite in so many pictures of a stack: they lie above one another in no order.
SPRITE_EVERY = 3
# Skin, skull and the fluid under it, of an MR.
SCALP_MM = 20.0
# Half axes of a sprite, as shares of its radius.
SPRITE_AXES = (0.7, 1.4)


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
    brain = foreground_mask_of(volume)
    placed = _shape_on_scan(volume, brain, shape, rng.uniform(-JITTER_MM, JITTER_MM, 3))
    changed, truth = synthetic_lesion.insert_lesion(volume.array, brain, placed, volume.spacing, contrast)
    return Lesioned(Volume(changed, volume.affine), truth)


def insert_sprites(
    volume: Volume, radius_mm: float, contrast: float, seed: int, *, ct: bool = True, every: int = SPRITE_EVERY
) -> Lesioned:
    """Ellipses in some pictures of a head, wherever there is brain enough.

    Parameters
    ----------
    volume : Volume
        A stack of pictures, the last axis upwards.
    radius_mm : float
        Of a circle of about the same area.
    contrast : float
        As of `insert_lesion`.
    seed : int
        Of places, axes and directions.
    ct : bool
        Whether the values are Hounsfield units.
    every : int
        One sprite in so many pictures.
    """
    rng = np.random.default_rng([seed, 11])
    brain = brain_in_ct(volume) if ct else inner_head(volume)
    shape = np.zeros(volume.shape, np.float32)
    index = np.indices(volume.shape[:2])
    for z in range(int(rng.integers(every)), volume.shape[2], every):
        pixels = radius_mm / volume.spacing[:2]
        depth = ndimage.distance_transform_edt(brain[:, :, z])
        places = np.argwhere(depth > pixels.mean() / 2)
        if not len(places):
            continue
        offset = index - places[rng.integers(len(places))][:, None, None]
        angle, stretch = rng.uniform(0, np.pi), rng.uniform(*SPRITE_AXES)
        turned = np.tensordot([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], offset, 1)
        axes = pixels * np.array([stretch, 1 / stretch])
        shape[:, :, z] = ((turned / axes[:, None, None]) ** 2).sum(axis=0) <= 1
    changed, truth = synthetic_lesion.insert_lesion(volume.array, brain, shape, volume.spacing, contrast)
    return Lesioned(Volume(changed, volume.affine), truth)


def brain_in_ct(volume: Volume) -> npt.NDArray[np.bool_]:
    """Soft tissue inside the skull, picture by picture, (X, Y, Z)."""
    low, high = SOFT_TISSUE_HU
    soft = (volume.array > low) & (volume.array < high)
    brain = np.zeros(volume.shape, dtype=np.bool_)
    least = LEAST_BRAIN_CM2 * 100 / volume.spacing[:2].prod()
    for z in range(volume.shape[2]):
        inner = ndimage.binary_opening(soft[:, :, z], iterations=BRAIN_MARGIN)
        parts, count = ndimage.label(inner)
        if count:
            largest = 1 + int(np.argmax(ndimage.sum_labels(inner, parts, range(1, count + 1))))
            part = ndimage.binary_fill_holes(parts == largest) & (volume.array[:, :, z] < high)
            brain[:, :, z] = part & (part.sum() >= least)
    return brain


def inner_head(volume: Volume) -> npt.NDArray[np.bool_]:
    """What lies deep enough in an MR of a head to be brain, picture by picture, (X, Y, Z)."""
    filled = fill_holes_by_slice(foreground_mask_of(volume).transpose(2, 0, 1))
    deep = [ndimage.distance_transform_edt(image, volume.spacing[:2]) > SCALP_MM for image in filled]
    least = LEAST_BRAIN_CM2 * 100 / volume.spacing[:2].prod()
    return np.stack([image & (image.sum() >= least) for image in deep], axis=2)


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
