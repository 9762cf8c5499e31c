"""A volume written as the single-frame DICOM series that a scanner would send.

Patient data is made up and carries `SECRET`, so that a test can look for it where it must not be.
The same volume and settings give the same bytes.
"""

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pydicom
from nibabel import orientations
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

from app.volume import Affine, Volume

Plane = Literal["axial", "sagittal", "coronal"]

SECRET = "Zweistein"  # noqa: S105 - a name
# Where columns, rows and slices run in the picture that a scanner makes of each plane (RAS codes).
SCANNED = {"axial": "LPS", "sagittal": "PIR", "coronal": "LIP"}
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Series:
    """How to write a volume.

    Attributes
    ----------
    plane : {"axial", "sagittal", "coronal"} or None
        Which of the volume's axes becomes the slice axis: the one nearest to the plane's normal. None: the
        volume's own axes are columns, rows and slices.
    rescale : (slope, intercept) or None
        Stored value -> unit. None: none is needed, or the full range of 16 bits for MR.
    syntax : str
        Transfer syntax; anything that pydicom can encode here.
    name : str
        Tells series of one test apart: it makes the UIDs.
    """

    modality: Literal["MR", "CT"] = "MR"
    plane: Plane | None = "axial"
    rescale: tuple[float, float] | None = None
    syntax: str = ExplicitVRLittleEndian
    description: str = "T1w MPRAGE"
    name: str = "one"
    photometric: Literal["MONOCHROME1", "MONOCHROME2"] = "MONOCHROME2"


STANDARD = Series()


def write_series(folder: Path, volume: Volume, series: Series = STANDARD) -> list[Path]:
    """Write a volume as files whose names have nothing to do with their order; paths by slice."""
    return save(folder, datasets(volume, series))


def save(folder: Path, slices: Sequence[FileDataset]) -> list[Path]:
    """Write data sets under shuffled names without an extension; paths in the given order."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(0).permutation(len(slices))
    paths = [folder / f"IM{name:05d}" for name in names]
    for path, dataset in zip(paths, slices, strict=True):
        dataset.save_as(path, enforce_file_format=True)
    return paths


def zipped(path: Path, files: Iterable[Path]) -> Path:
    """Pack files into one zip, under their own names."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.name)
    return path


def datasets(volume: Volume, series: Series = STANDARD) -> list[FileDataset]:
    """Make the slices of a volume, to be changed and saved by a test; in the order of the slice axis."""
    array, affine = scanned(volume, series.plane)
    slope, intercept = series.rescale or _rescale(array, series.modality)
    stored = np.round((array - intercept) / slope)
    lowest, highest = (-(2**15), 2**15 - 1) if series.modality == "CT" else (0, 2**16 - 1)
    assert stored.min() >= lowest, "the rescale does not fit the volume"
    assert stored.max() <= highest, "the rescale does not fit the volume"
    if series.photometric == "MONOCHROME1":
        stored = highest + lowest - stored
    pixels = stored.astype(np.int16 if series.modality == "CT" else np.uint16)
    slices = []
    for k in range(pixels.shape[2]):
        dataset = _dataset(series, k)
        _place(dataset, affine, k)
        _rescaled(dataset, slope, intercept, series.modality)
        _fill(dataset, np.ascontiguousarray(pixels[:, :, k].T))  # (columns, rows) -> (rows, columns)
        if series.syntax != ExplicitVRLittleEndian:
            _encode(dataset, series.syntax)
        slices.append(dataset)
    return slices


def scanned(volume: Volume, plane: Plane | None) -> tuple[npt.NDArray[np.float32], Affine]:
    """A volume with its axes as (columns, rows, slices) of a plane; no voxel changes its place."""
    if plane is None:
        return volume.array, volume.affine
    here = nib.io_orientation(volume.affine)
    change = orientations.ornt_transform(here, orientations.axcodes2ornt(tuple(SCANNED[plane])))
    array = orientations.apply_orientation(volume.array, change)
    return array, volume.affine @ orientations.inv_ornt_aff(change, volume.shape)


def _rescale(array: npt.NDArray[np.float32], modality: str) -> tuple[float, float]:
    if modality == "CT":
        return 1.0, -1024.0
    if np.array_equal(array, np.round(array)) and array.min() >= 0 and array.max() < 2**16:
        return 1.0, 0.0
    low = float(array.min())
    return (float(array.max()) - low) / (2**16 - 1), low


def _dataset(series: Series, k: int) -> FileDataset:
    """Everything but place and pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage if series.modality == "CT" else MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["instance", series.name, str(k)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["study"])
    dataset.SeriesInstanceUID = series_uid(series)
    dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame of reference"])
    dataset.PatientName, dataset.PatientID = f"{SECRET}^Alberta", f"{SECRET}-4711"
    dataset.PatientBirthDate, dataset.PatientSex = "19000101", "O"
    dataset.StudyDate = dataset.SeriesDate = "20200101"
    dataset.StudyTime, dataset.StudyID, dataset.AccessionNumber = "120000", "1", ""
    dataset.ReferringPhysicianName = f"{SECRET}^Doctor"
    dataset.Modality, dataset.Manufacturer = series.modality, "Counterpart tests"
    dataset.SeriesNumber, dataset.InstanceNumber = 1, k + 1
    dataset.SeriesDescription = series.description
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if series.modality == "CT" else "M"]
    if series.modality == "MR":
        dataset.ScanningSequence, dataset.SequenceVariant = ["GR", "IR"], ["SP", "MP"]
        dataset.ScanOptions, dataset.MRAcquisitionType = "", "3D"
    dataset.PhotometricInterpretation = series.photometric
    return dataset


def series_uid(series: Series) -> str:
    """SeriesInstanceUID of what is written with these settings."""
    return str(generate_uid(entropy_srcs=["series", series.name]))


def _place(dataset: FileDataset, affine: Affine, k: int) -> None:
    lps = RAS_TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    directions = lps[:3, :3] / spacing
    dataset.ImageOrientationPatient = [_ds(v) for v in (*directions[:, 0], *directions[:, 1])]
    dataset.ImagePositionPatient = [_ds(v) for v in lps[:3, :3] @ [0, 0, k] + lps[:3, 3]]
    dataset.PixelSpacing = [_ds(spacing[1]), _ds(spacing[0])]  # between rows, between columns
    dataset.SliceThickness = _ds(spacing[2])


def _ds(value: float) -> str:
    """A decimal string as scanners write it: at most 16 characters."""
    return str(pydicom.valuerep.format_number_as_ds(float(value)))


def _rescaled(dataset: FileDataset, slope: float, intercept: float, modality: str) -> None:
    if modality == "CT" or (slope, intercept) != (1.0, 0.0):
        dataset.RescaleSlope, dataset.RescaleIntercept = _ds(slope), _ds(intercept)
        dataset.RescaleType = "HU" if modality == "CT" else "US"


def _fill(dataset: FileDataset, pixels: npt.NDArray[np.generic]) -> None:
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel = 1
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, int(pixels.dtype == np.int16)
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"


def _encode(dataset: FileDataset, syntax: str) -> None:
    uid = pydicom.uid.UID(syntax)
    if uid.is_compressed and uid.is_encapsulated:
        dataset.compress(uid, generate_instance_uid=False)
    else:
        dataset.file_meta.TransferSyntaxUID = uid
