"""Writer of a volume as the single-frame DICOM series that a scanner would send.

Patient data is made up and contains `SECRET`, so that a test can check that it does not appear in results and logs.
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
# Directions of columns, rows and slices in the image that a scanner makes of each plane (RAS codes).
PLANE_AXES = {"axial": "LPS", "sagittal": "PIR", "coronal": "LIP"}
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Series:
    """Settings of a series.

    Attributes
    ----------
    plane : {"axial", "sagittal", "coronal"} or None
        The volume's axis nearest to the normal of this plane becomes the slice axis. None: the volume's own axes
        are columns, rows and slices.
    rescale : (slope, intercept) or None
        Conversion from stored values to units. None: no rescale, or for MR the full range of 16 bits if needed.
    syntax : str
        Transfer syntax that pydicom can encode.
    name : str
        Name from which the UIDs are made, so that the series of one test differ.
    """

    modality: Literal["MR", "CT"] = "MR"
    plane: Plane | None = "axial"
    rescale: tuple[float, float] | None = None
    syntax: str = ExplicitVRLittleEndian
    description: str = "T1w MPRAGE"
    name: str = "one"
    photometric: Literal["MONOCHROME1", "MONOCHROME2"] = "MONOCHROME2"


DEFAULT_SERIES = Series()


def write_series(folder: Path, volume: Volume, series: Series = DEFAULT_SERIES) -> list[Path]:
    """Write a volume as files whose names do not follow the order of the slices, and return the paths in that order."""
    return save(folder, make_datasets(volume, series))


def save(folder: Path, slices: Sequence[FileDataset]) -> list[Path]:
    """Write data sets under shuffled names without a suffix, and return the paths in the given order."""
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(0).permutation(len(slices))
    paths = [folder / f"IM{name:05d}" for name in names]
    for path, dataset in zip(paths, slices, strict=True):
        dataset.save_as(path, enforce_file_format=True)
    return paths


def zip_files(path: Path, files: Iterable[Path]) -> Path:
    """Pack files into one zip, under their own names."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.name)
    return path


def make_datasets(volume: Volume, series: Series = DEFAULT_SERIES) -> list[FileDataset]:
    """Return the slices of a volume in the order of the slice axis. A test can change them before it saves them."""
    array, affine = reorient(volume, series.plane)
    slope, intercept = series.rescale or _choose_rescale(array, series.modality)
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
        _set_position(dataset, affine, k)
        _set_rescale(dataset, slope, intercept, series.modality)
        _set_pixels(dataset, np.ascontiguousarray(pixels[:, :, k].T))  # (columns, rows) -> (rows, columns)
        if series.syntax != ExplicitVRLittleEndian:
            _encode(dataset, series.syntax)
        slices.append(dataset)
    return slices


def reorient(volume: Volume, plane: Plane | None) -> tuple[npt.NDArray[np.float32], Affine]:
    """Return the array and affine of a volume with the axes (columns, rows, slices) of a plane.

    No voxel changes its position.
    """
    if plane is None:
        return volume.array, volume.affine
    current = nib.io_orientation(volume.affine)
    change = orientations.ornt_transform(current, orientations.axcodes2ornt(tuple(PLANE_AXES[plane])))
    array = orientations.apply_orientation(volume.array, change)
    return array, volume.affine @ orientations.inv_ornt_aff(change, volume.shape)


def _choose_rescale(array: npt.NDArray[np.float32], modality: str) -> tuple[float, float]:
    if modality == "CT":
        return 1.0, -1024.0
    if np.array_equal(array, np.round(array)) and array.min() >= 0 and array.max() < 2**16:
        return 1.0, 0.0
    low = float(array.min())
    return (float(array.max()) - low) / (2**16 - 1), low


def _dataset(series: Series, k: int) -> FileDataset:
    """Return a slice without position and pixels."""
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
    """Return the SeriesInstanceUID of a series with these settings."""
    return str(generate_uid(entropy_srcs=["series", series.name]))


def _set_position(dataset: FileDataset, affine: Affine, k: int) -> None:
    lps = RAS_TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    directions = lps[:3, :3] / spacing
    dataset.ImageOrientationPatient = [_ds(v) for v in (*directions[:, 0], *directions[:, 1])]
    dataset.ImagePositionPatient = [_ds(v) for v in lps[:3, :3] @ [0, 0, k] + lps[:3, 3]]
    dataset.PixelSpacing = [_ds(spacing[1]), _ds(spacing[0])]  # between rows, between columns
    dataset.SliceThickness = _ds(spacing[2])


def _ds(value: float) -> str:
    """Return a decimal string of at most 16 characters, as scanners write it."""
    return str(pydicom.valuerep.format_number_as_ds(float(value)))


def _set_rescale(dataset: FileDataset, slope: float, intercept: float, modality: str) -> None:
    if modality == "CT" or (slope, intercept) != (1.0, 0.0):
        dataset.RescaleSlope, dataset.RescaleIntercept = _ds(slope), _ds(intercept)
        dataset.RescaleType = "HU" if modality == "CT" else "US"


def _set_pixels(dataset: FileDataset, pixels: npt.NDArray[np.generic]) -> None:
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


def shift_slice(slices: Sequence[FileDataset], k: int, lps_mm: tuple[float, float, float]) -> None:
    """Move the position of one slice."""
    position = slices[k].ImagePositionPatient
    slices[k].ImagePositionPatient = [float(a) + b for a, b in zip(position, lps_mm, strict=True)]


def tilt_gantry(slices: Sequence[FileDataset]) -> None:
    """Shift axial slices of 2 mm spacing sideways, as a gantry tilted by 12.5 degrees does."""
    for k in range(len(slices)):
        shift_slice(slices, k, (0, 2.0 * k * np.tan(np.radians(12.5)), 0))
