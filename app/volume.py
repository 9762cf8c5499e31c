"""Volume: voxels together with the affine that places them in space."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from nibabel import affines

from app.errors import ConstantVoxels, InvalidGeometry, InvalidVoxels, NotAVolume

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Affine = npt.NDArray[np.float64]
# Handling of missing, tilted or unevenly spaced slices.
Geometry = Literal["refuse", "resample"]
Format = Literal["nifti", "mgh", "dicom"]
# Type of a DICOM segmentation. Binary has one bit for each pixel and segment. A label map has the number of the segment
# in each pixel: it is smaller for many segments, and only recent viewers open it.
SegmentationType = Literal["binary", "labelmap"]

# Suffix of a sequence with contrast agent, as in "T1c".
WITH_AGENT = "c"
# The description of every NIfTI result begins and ends with these words. The reader ignores such files beside a scan.
RESULT_PREFIX, RESULT_SUFFIX = "counterpart: ", "; research use only"
# No scanner has voxels below some tens of micrometres, or axes within a degree of each other.
SMALLEST_VOXEL_MM = 0.01
SMALLEST_INDEPENDENCE = 0.01


@dataclass(frozen=True, eq=False)
class Volume:
    """Three-dimensional scalar image on its own grid.

    Attributes
    ----------
    array : (X, Y, Z) ndarray of float32
        Values in the units of the scan, finite and not all equal.
    affine : (4, 4) ndarray of float64
        Voxel indices to RAS+ mm.

    Raises
    ------
    NotAVolume
        The array does not have three non-empty axes.
    InvalidVoxels
        A voxel is NaN or infinite.
    ConstantVoxels
        Every voxel has the same value.
    InvalidGeometry
        The affine is not finite, or is singular.
    """

    array: FloatArray
    affine: Affine

    def __post_init__(self) -> None:
        # A value beyond float32 becomes infinite, and is counted as an invalid voxel.
        with np.errstate(over="ignore"):
            object.__setattr__(self, "array", np.asarray(self.array, dtype=np.float32))
        object.__setattr__(self, "affine", np.asarray(self.affine, dtype=np.float64))
        _check_array(self.array)
        _check_affine(self.affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along each axis."""
        x, y, z = self.array.shape
        return x, y, z

    @property
    def spacing(self) -> npt.NDArray[np.float64]:
        """Voxel size along each axis in millimetres, (3,)."""
        return np.asarray(affines.voxel_sizes(self.affine), dtype=np.float64)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


@dataclass(frozen=True)
class Scanner:
    """Scanner that the header of a scan names. It contains no patient data.

    Attributes
    ----------
    manufacturer, model : str
        Upper case, because one device does not always write them in the same way.
    field_strength : float or None
        MR: magnetic field strength in tesla, rounded to 0.1.
    """

    manufacturer: str
    model: str
    field_strength: float | None = None


@dataclass(frozen=True)
class Source:
    """Properties of a scan other than its voxels. None of them may be logged.

    Attributes
    ----------
    format : {"nifti", "mgh", "dicom"}
    modality : {"MR", "CT"} or None
        None if the format does not state it (NIfTI, MGH).
    sequences : tuple of str
        Sequences that the header of an MR scan states, such as "T1" or "FLAIR", in order of priority. There are
        several if the header contradicts itself, and none if it states no sequence (NIfTI, MGH).
    contrast_agent : bool
        The header states a contrast agent.
    looks_hounsfield : bool
        NIfTI, MGH: the values look like Hounsfield units.
    sform_code : int
        NIfTI: code of the space (1 scanner, 2 aligned, 3 Talairach, 4 MNI).
    instances : tuple of Path
        DICOM: files of the slices in the order of the last axis of the volume. An enhanced image or a mosaic is one
        file. If `resampled`, files of the acquired slices.
    frames : tuple of int
        Enhanced DICOM: index of the frame of each slice, from 0, in the order of the last axis of the volume. If
        `resampled`, frames of the acquired slices. Empty for other formats.
    series_uid : str
        DICOM: SeriesInstanceUID. Empty for other formats.
    resampled : bool
        The grid of the volume differs from that of the instances, because irregular slices were resampled on request.
    scanner : Scanner or None
        DICOM: scanner of the series. None if the header does not name its manufacturer and model.
    notes : tuple of str
        Sentences about decisions and omissions of the reader, without patient data. The report contains them.
    warnings : tuple of str
        Sentences about faults of the scan that may make the whole result wrong.
    """

    format: Format
    modality: Literal["MR", "CT"] | None = None
    sequences: tuple[str, ...] = ()
    contrast_agent: bool = False
    looks_hounsfield: bool = False
    sform_code: int = 1
    instances: tuple[Path, ...] = ()
    frames: tuple[int, ...] = ()
    series_uid: str = ""
    resampled: bool = False
    scanner: Scanner | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def position_warning(self) -> str:
        """Sentence about an assumed position in space; empty if the file states its position."""
        if self.sform_code:
            return ""
        return "The file states no position in space. Its axes were assumed, and left and right may be exchanged."


@dataclass(frozen=True, eq=False)
class Scan:
    """Volume and its source."""

    volume: Volume
    source: Source


def _check_array(array: FloatArray) -> None:
    if array.ndim != 3 or 0 in array.shape:
        raise NotAVolume(
            f"The image has the shape {array.shape}.",
            expected="three non-empty axes and one value per voxel.",
            advice="Send one volume. Split time series, and convert colour images to greyscale.",
        )
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise InvalidVoxels(
            f"{bad} of {array.size} voxels are NaN or infinite.",
            expected="a finite number in every voxel.",
            advice="Export the scan again, or set the background to 0.",
        )
    if array.min() == array.max():
        raise ConstantVoxels(
            "Every voxel has the same value.",
            expected="an image with contrast.",
            advice="Check that the exported file contains the pixel data.",
        )


def is_valid_affine(affine: Affine) -> bool:
    """Return True if an affine is finite and has three independent axes of the size of a voxel."""
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or (affine[3] != (0, 0, 0, 1)).any():
        return False
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    # The determinant is 1 for orthogonal axes, 0 for parallel ones, independent of the voxel size.
    return bool(sizes.min() > SMALLEST_VOXEL_MM and abs(np.linalg.det(affine[:3, :3] / sizes)) > SMALLEST_INDEPENDENCE)


def _check_affine(affine: Affine) -> None:
    if not is_valid_affine(affine):
        raise InvalidGeometry(
            "The matrix from voxel indices to millimetres is not finite or not invertible.",
            expected="three axes that are not parallel, with voxels larger than "
            f"{SMALLEST_VOXEL_MM} mm (sform or qform of NIfTI, orientation of DICOM).",
            advice="Export the scan again, including its orientation.",
        )
