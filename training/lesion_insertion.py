"""Synthetic lesions in healthy scans: shapes of real lesions or foreign patches in volumes, ellipses in stacks."""

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

# Bounds of the brain in the space of the lesion masks, RAS+ mm: mean of the skull-stripped test patients. The bounds
# of a scan are mapped to them axis by axis.
SHAPE_BRAIN_MM = ((-64.0, -97.5, -54.0), (64.5, 57.0, 67.5))
# MS patients that are separate test cases. Their masks are not used as shapes.
MS_TEST_PATIENTS = ("patient07", "patient19")
# Largest random displacement of a shape along each axis.
JITTER_MM = 4.0
# Brain in a head CT: soft tissue, opened by this many pixels so that it does not touch bone or air.
SOFT_TISSUE_HU = (5.0, 65.0)
OPENING_PIXELS = 2
# A smaller area in a slice is not brain but neck muscle, or the last part below the vertex.
MIN_BRAIN_CM2 = 50.0
# One image in this many gets an ellipse: the images of a MedNIST stack are in no anatomical order.
ELLIPSE_EVERY = 3
# Depth of skin, skull and fluid in an MR of a head.
SCALP_MM = 20.0
# Range of the half axes of an ellipse, relative to its radius.
ELLIPSE_AXES = (0.7, 1.4)
# Distance of the place that a foreign patch is copied from, and the number of places that are tried.
PATCH_DISTANCE_MM = (25.0, 60.0)
PATCH_TRIALS = 100
# Smallest share of the patch that must come from the brain, and smallest mean absolute difference to the tissue that it
# replaces, relative to the robust range of the brain. White matter in place of white matter is not a lesion.
PATCH_INSIDE = 0.95
PATCH_DIFFERENCE = 0.15


@dataclass(frozen=True, eq=False)
class LesionedScan:
    """Healthy scan with a synthetic lesion.

    Attributes
    ----------
    volume : Volume
        Changed scan.
    truth : (X, Y, Z) ndarray of bool
        Voxels that are changed by more than half of the full change.
    """

    volume: Volume
    truth: npt.NDArray[np.bool_]

    @property
    def truth_ml(self) -> float:
        """Volume of the lesion."""
        return float(self.truth.sum()) * self.volume.voxel_ml


def load_lesion_shape(patient: str) -> Volume:
    """Load the consensus lesion mask of an MS patient in MNI space (Lesjak et al. 2018)."""
    path = data_root() / "ms_open_ms_data" / "gold_mni" / f"{patient}_gold.nii.gz"
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return Volume((np.asarray(image.dataobj) > 0).astype(np.float32), np.asarray(image.affine))


def insert_lesion(volume: Volume, shape: Volume, contrast: float, seed: int) -> LesionedScan:
    """Change the intensity of a healthy scan inside the shape of a lesion.

    Parameters
    ----------
    volume : Volume
        Healthy, skull-stripped scan.
    shape : Volume
        Binary mask in MNI space.
    contrast : float
        Change of intensity relative to the robust range of the brain (2nd to 98th percentile). Negative darkens.
    seed : int
        Seed of the random displacement.
    """
    rng = np.random.default_rng([seed, 7])
    brain = foreground_mask_of(volume)
    placed = _shape_on_scan(volume, brain, shape, rng.uniform(-JITTER_MM, JITTER_MM, 3))
    changed, truth = synthetic_lesion.insert_lesion(volume.array, brain, placed, volume.spacing, contrast)
    return LesionedScan(Volume(changed, volume.affine), truth)


def insert_foreign_patch(volume: Volume, shape: Volume, seed: int) -> LesionedScan:
    """Replace the tissue under a shape by tissue of another place of the same brain.

    No intensity is shifted, so that this family differs from the patches of the training and from `insert_lesion`: the
    structure is wrong for its place. It follows foreign patch interpolation (J. Tan et al. 2020, arXiv 2011.04197) and
    CutPaste (C.-L. Li et al. 2021, arXiv 2104.04015), with an edge like that of `insert_lesion`.

    Parameters
    ----------
    volume : Volume
        Healthy, skull-stripped scan.
    shape : Volume
        Binary mask in MNI space.
    seed : int
        Seed of the displacement of the shape, and of the place that the tissue is copied from.
    """
    rng = np.random.default_rng([seed, 13])
    brain = foreground_mask_of(volume)
    placed = _shape_on_scan(volume, brain, shape, rng.uniform(-JITTER_MM, JITTER_MM, 3))
    weight = ndimage.gaussian_filter(placed, synthetic_lesion.EDGE_MM / 2 / volume.spacing) * brain
    offset = _foreign_offset(volume, brain, np.argwhere(weight > 0.5), rng)
    foreign = ndimage.shift(volume.array, -offset, order=0)
    weight = weight * ndimage.shift(brain.astype(np.uint8), -offset, order=0)
    changed = (volume.array + weight * (foreign - volume.array)).astype(np.float32)
    return LesionedScan(Volume(changed, volume.affine), weight > 0.5)


def insert_ellipses(
    volume: Volume, radius_mm: float, contrast: float, seed: int, *, ct: bool = True, every: int = ELLIPSE_EVERY
) -> LesionedScan:
    """Insert an ellipse into some slices of a head, at a random position inside the brain.

    Parameters
    ----------
    volume : Volume
        Stack of axial slices along the last axis.
    radius_mm : float
        Radius of a circle of about the same area.
    contrast : float
        See `insert_lesion`.
    seed : int
        Seed of positions, half axes and angles.
    ct : bool
        True if the values are in Hounsfield units.
    every : int
        Insert one ellipse in this many slices.
    """
    rng = np.random.default_rng([seed, 11])
    brain = segment_ct_brain(volume) if ct else segment_inner_head(volume)
    shape = np.zeros(volume.shape, np.float32)
    index = np.indices(volume.shape[:2])
    for z in range(int(rng.integers(every)), volume.shape[2], every):
        pixels = radius_mm / volume.spacing[:2]
        depth = ndimage.distance_transform_edt(brain[:, :, z])
        positions = np.argwhere(depth > pixels.mean() / 2)
        if not len(positions):
            continue
        offset = index - positions[rng.integers(len(positions))][:, None, None]
        angle, stretch = rng.uniform(0, np.pi), rng.uniform(*ELLIPSE_AXES)
        rotated = np.tensordot([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], offset, 1)
        axes = pixels * np.array([stretch, 1 / stretch])
        shape[:, :, z] = ((rotated / axes[:, None, None]) ** 2).sum(axis=0) <= 1
    changed, truth = synthetic_lesion.insert_lesion(volume.array, brain, shape, volume.spacing, contrast)
    return LesionedScan(Volume(changed, volume.affine), truth)


def segment_ct_brain(volume: Volume) -> npt.NDArray[np.bool_]:
    """Return the soft tissue inside the skull, slice by slice, (X, Y, Z)."""
    low, high = SOFT_TISSUE_HU
    soft = (volume.array > low) & (volume.array < high)
    brain = np.zeros(volume.shape, dtype=np.bool_)
    min_pixels = MIN_BRAIN_CM2 * 100 / volume.spacing[:2].prod()
    for z in range(volume.shape[2]):
        inner = ndimage.binary_opening(soft[:, :, z], iterations=OPENING_PIXELS)
        parts, count = ndimage.label(inner)
        if count:
            largest = 1 + int(np.argmax(ndimage.sum_labels(inner, parts, range(1, count + 1))))
            part = ndimage.binary_fill_holes(parts == largest) & (volume.array[:, :, z] < high)
            brain[:, :, z] = part & (part.sum() >= min_pixels)
    return brain


def segment_inner_head(volume: Volume) -> npt.NDArray[np.bool_]:
    """Return the part of a head MR that is deep enough to be brain, slice by slice, (X, Y, Z)."""
    filled = fill_holes_by_slice(foreground_mask_of(volume).transpose(2, 0, 1))
    deep = [ndimage.distance_transform_edt(image, volume.spacing[:2]) > SCALP_MM for image in filled]
    min_pixels = MIN_BRAIN_CM2 * 100 / volume.spacing[:2].prod()
    return np.stack([image & (image.sum() >= min_pixels) for image in deep], axis=2)


def _foreign_offset(
    volume: Volume, brain: npt.NDArray[np.bool_], voxels: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return the offset in voxels, (3,), of a place whose tissue differs from that of some voxels (M, 3).

    The first of some random places that is inside the brain and differs enough is taken. If there is none, the one that
    differs most over the part inside the brain is taken.
    """
    low, high = np.percentile(volume.array[brain], synthetic_lesion.ROBUST_PERCENTILES)
    to_voxels = np.linalg.inv(volume.affine[:3, :3])
    best, best_difference = np.zeros(3, np.int64), -1.0
    for _ in range(PATCH_TRIALS):
        direction = rng.normal(size=3)
        offset_mm = direction / np.linalg.norm(direction) * rng.uniform(*PATCH_DISTANCE_MM)
        offset = np.rint(to_voxels @ offset_mm).astype(np.int64)
        there = voxels + offset
        inside = np.asarray(((there >= 0) & (there < volume.shape)).all(axis=1))
        inside[inside] = brain[tuple(there[inside].T)]
        change = np.abs(volume.array[tuple(there[inside].T)] - volume.array[tuple(voxels[inside].T)])
        difference = float(change.sum()) / len(voxels) / float(high - low)
        if inside.mean() >= PATCH_INSIDE and difference >= PATCH_DIFFERENCE:
            return offset
        if difference > best_difference:
            best, best_difference = offset, difference
    return best


def _shape_on_scan(
    volume: Volume, brain: npt.NDArray[np.bool_], shape: Volume, shift_mm: npt.NDArray[np.float64]
) -> FloatArray:
    """Resample the shape to the grid of the scan, (X, Y, Z) in [0, 1]."""
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
