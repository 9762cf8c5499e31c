"""A scan as the pipeline sees it: voxels and the affine that places them, never apart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from nibabel import affines

from app.errors import ConstantVoxels, InvalidGeometry, InvalidVoxels, NotAVolume

FloatArray = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]
# What to do with slices that are missing, tilted or unevenly spaced.
Geometry = Literal["refuse", "resample"]

# No scanner makes smaller voxels than some tens of micrometres, or axes within a degree of each other.
SMALLEST_VOXEL_MM = 0.01
SMALLEST_INDEPENDENCE = 0.01


@dataclass(frozen=True, eq=False)
class Volume:
    """A three-dimensional grey image on its own grid.

    Attributes
    ----------
    array : (X, Y, Z) ndarray of float32
        Voxel values in the scan's own units; finite and not all equal.
    affine : (4, 4) ndarray of float64
        Voxel indices to RAS+ millimetres.

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
        # A number beyond float32 becomes infinite, and is counted with the other invalid ones.
        with np.errstate(over="ignore"):
            object.__setattr__(self, "array", np.asarray(self.array, dtype=np.float32))
        object.__setattr__(self, "affine", np.asarray(self.affine, dtype=np.float64))
        _check_array(self.array)
        _check_affine(self.affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each axis."""
        x, y, z = self.array.shape
        return x, y, z

    @property
    def spacing(self) -> npt.NDArray[np.float64]:
        """Millimetres along each voxel axis, (3,)."""
        return np.asarray(affines.voxel_sizes(self.affine), dtype=np.float64)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


@dataclass(frozen=True)
class Source:
    """What is known of a scan beside its voxels; nothing in it may reach a log.

    Attributes
    ----------
    format : {"nifti", "mgh", "dicom"}
        What was sent.
    modality : {"MR", "CT"} or None
        None where the format does not say (NIfTI, MGH).
    sequences : tuple of str
        What an MR scan says that its sequence is, "T1" or "FLAIR" say, the most trusted first: several where it
        contradicts itself, none where it says nothing (NIfTI, MGH).
    contrast_agent : bool
        It says that one was given.
    hounsfield : bool
        NIfTI, MGH: its values look like Hounsfield units (`app.ingest.volume_file`).
    sform_code : int
        NIfTI's code of the space (1 scanner, 2 aligned, 3 Talairach, 4 MNI).
    instances : tuple of Path
        DICOM: files of the slices, in the order of the volume's last axis; one file for an enhanced image or a
        mosaic; where `resampled`, of the slices as they were acquired.
    frames : tuple of int
        DICOM enhanced: which frame of the image each slice is, from 0, in the order of the volume's last axis
        (where `resampled`, of the slices as they were acquired); empty for everything else.
    series_uid : str
        DICOM: SeriesInstanceUID; empty for NIfTI.
    resampled : bool
        The volume's grid is not that of the instances: the caller had irregular slices resampled.
    notes : tuple of str
        What reading decided or left out, in sentences without patient data; they go into the report.
    """

    format: Literal["nifti", "mgh", "dicom"]
    modality: Literal["MR", "CT"] | None = None
    sequences: tuple[str, ...] = ()
    contrast_agent: bool = False
    hounsfield: bool = False
    sform_code: int = 1
    instances: tuple[Path, ...] = ()
    frames: tuple[int, ...] = ()
    series_uid: str = ""
    resampled: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Scan:
    """A volume and where it came from."""

    volume: Volume
    source: Source


def _check_array(array: FloatArray) -> None:
    if array.ndim != 3 or 0 in array.shape:
        raise NotAVolume(
            f"The image has the shape {array.shape}.",
            expected="three non-empty axes, one grey value a voxel.",
            advice="Send one volume: split time series, and convert colour images to grey.",
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
            advice="Check that the export holds the pixel data.",
        )


def _check_affine(affine: Affine) -> None:
    if affine.shape == (4, 4) and np.isfinite(affine).all() and (affine[3] == (0, 0, 0, 1)).all():
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        if sizes.min() > SMALLEST_VOXEL_MM:
            # 1 for axes at right angles, 0 for parallel ones, whatever the size of the voxels.
            independence = abs(np.linalg.det(affine[:3, :3] / sizes))
            if independence > SMALLEST_INDEPENDENCE:
                return
    raise InvalidGeometry(
        "The matrix from voxels to millimetres is not finite or not invertible.",
        expected="three independent axes of more than "
        f"{SMALLEST_VOXEL_MM} mm a voxel (sform or qform of NIfTI, orientation of DICOM).",
        advice="Export the scan again with its orientation.",
    )
