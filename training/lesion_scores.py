"""Lesion-wise scores: which true lesions are found, and how many findings are false.

The definition is that of the ISBI 2015 challenge (A. Carass et al., Longitudinal multiple sclerosis lesion
segmentation: Resource and challenge, NeuroImage 148, 2017, 77-102): a true lesion is found if at least one of its
voxels is marked, and a finding is false if it touches no true lesion. Lesions and findings are connected components,
here with 26 neighbours, as in the service.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from app.pipeline.findings import LabelArray
from app.volume import BoolArray

# The service reports no smaller finding, so a smaller true lesion is not counted.
MIN_LESION_ML = 0.05
# Lower limits of the size classes in millilitres.
SIZE_CLASSES_ML = (MIN_LESION_ML, 0.5, 2.0, 10.0)


@dataclass(frozen=True)
class LesionScores:
    """Lesion-wise scores of one scan.

    Attributes
    ----------
    lesions : tuple of (float, bool)
        Volume in millilitres of each true lesion, and whether it is found.
    false_findings : int
        Findings that touch no true lesion of any size.
    false_ml : float
        Their volume.
    """

    lesions: tuple[tuple[float, bool], ...]
    false_findings: int
    false_ml: float


def score_lesions(labels: LabelArray, truth: BoolArray, voxel_ml: float) -> LesionScores:
    """Compare the findings of a scan with its true lesions.

    Parameters
    ----------
    labels : (X, Y, Z) ndarray of int
        Findings, 0 elsewhere.
    truth : (X, Y, Z) ndarray of bool
    voxel_ml : float
    """
    lesions, _ = ndimage.label(truth, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(lesions.ravel())[1:] * voxel_ml
    hits = np.bincount(lesions[labels > 0], minlength=len(sizes) + 1)[1:] > 0
    finding_sizes = np.bincount(labels.ravel())[1:]
    touching = np.bincount(labels[truth], minlength=len(finding_sizes) + 1)[1:] > 0
    false = ~touching & (finding_sizes > 0)
    counted = sizes >= MIN_LESION_ML
    found = tuple((round(float(ml), 3), bool(hit)) for ml, hit in zip(sizes[counted], hits[counted], strict=True))
    return LesionScores(found, int(false.sum()), float(finding_sizes[false].sum() * voxel_ml))


def size_class(ml: float) -> int:
    """Return the index of the size class of a lesion of at least the smallest counted volume."""
    return int(np.searchsorted(SIZE_CLASSES_ML, ml, side="right")) - 1


def size_class_name(index: int) -> str:
    """Return the limits of a size class."""
    low = SIZE_CLASSES_ML[index]
    last = index + 1 == len(SIZE_CLASSES_ML)
    return f"{low:g} ml and more" if last else f"{low:g} to {SIZE_CLASSES_ML[index + 1]:g} ml"
