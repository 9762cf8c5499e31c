"""Source series of the DICOM results: the required attributes (types 1 and 2) and the position of each slice.

highdicom copies every patient and study attribute that it finds in a source. The data sets given to it contain only
the attributes listed here.
"""

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
)
from pydicom.valuerep import DA, TM, format_number_as_ds

from app.dicom_attributes import functional_group, numbers, optional_numbers
from app.errors import UnsuitableSource
from app.volume import Affine, Scan

PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber")
SERIES = ("SeriesInstanceUID", "Modality", "FrameOfReferenceUID", "PositionReferenceIndicator")
INSTANCE = ("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Rows", "Columns")
# Free text whose bytes may not fit the declared character set.
TEXTS = ("PatientName", "PatientID", "ReferringPhysicianName", "StudyID", "AccessionNumber")
# Required in an object that is derived from a lossy image (PS3.3 C.7.6.1.1.5).
LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
COPIED = (*PATIENT, *STUDY, *SERIES, *INSTANCE, *LOSSY)
# Read, but not copied unchanged.
_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
_GROUPS = ("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# Time of the pixels, most specific first. Each supported image has at least one pair as type 1 or 2.
_TIMES = (
    ("ContentDate", "ContentTime"),
    ("AcquisitionDate", "AcquisitionTime"),
    ("SeriesDate", "SeriesTime"),
    ("StudyDate", "StudyTime"),
)
_TAGS = [Tag(name) for name in (*COPIED, *_GEOMETRY, *_GROUPS, *(name for pair in _TIMES for name in pair))]
# Content Date is required. An anonymised source without any date gets this obviously wrong one.
NO_DATE = (DA("19000101"), TM("000000"))

_SINGLE_FRAME = (CTImageStorage, MRImageStorage)
_MULTI_FRAME = (
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
)
_REQUIRED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")

_ONE_FRAME = "one frame of reference for a segmentation. report.dcm needs none."

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# The reader accepts slices up to 0.2 mm off a straight line and 0.05 mm off an even distance.
SAME_POSITION_MM = 0.3
SAME_DIRECTION = 2e-3


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """Series in the form that highdicom expects, and the position of its slices in the scan.

    Attributes
    ----------
    images : tuple of Dataset
        One per slice, in the order of the scan's last axis, or one multi-frame image. Several multi-frame images (a
        concatenation) are one here, with the frames of all.
    positions : tuple of sequence, or None
        ImagePositionPatient of each slice of the scan, with the source's own numbers. None if the scan's slices are
        not images or frames of the source (resampled series, tiles of a mosaic).
    frames : frozenset of int
        Numbers, from 1, of the frames of a multi-frame image that were read.
    lps_affine : (4, 4) ndarray of float64
        Scan indices (column, row, slice) to LPS millimetres.
    content_time : (DA, TM)
        Latest time that the source gives for its pixels. The current time would change the bytes of each object.
    evidence : tuple of Dataset
        One per file of the source.
    origins : tuple of (str, int)
        For several multi-frame images: SOPInstanceUID and number, from 1, of each frame of the one in `images`.
        Empty for other sources.
    raw_texts : dict of str to bytes
        Bytes of the attributes of `TEXTS` as they are in the first image.
    not_positioned : UnsuitableSource or None
        Reason why no segmentation can be placed in the series: it has no frame of reference, or several.
    """

    images: tuple[Dataset, ...]
    positions: tuple[Sequence[float], ...] | None
    frames: frozenset[int]
    lps_affine: Affine
    content_time: tuple[dt.date, dt.time]
    evidence: tuple[Dataset, ...]
    origins: tuple[tuple[str, int], ...]
    raw_texts: dict[str, bytes]
    not_positioned: UnsuitableSource | None

    @property
    def uid(self) -> str:
        """SeriesInstanceUID."""
        return str(self.images[0].SeriesInstanceUID)


@dataclass(frozen=True, eq=False)
class _Frame:
    """One frame of a source file. Its numbers are not converted."""

    image: int
    position: Sequence[float]
    orientation: Sequence[float]
    spacing: Sequence[float]
    thickness: float | None


def read_source(scan: Scan) -> SourceSeries:
    """Read the headers of a scan's series again and match its slices to frames.

    Raises
    ------
    UnsuitableSource
        DICOM objects cannot refer to the series: UIDs are missing, or its SOP class is not supported.
    """
    headers = [_read(path) for path in scan.source.instances]
    _check(headers)
    raw_texts = [_raw_texts(header) for header in headers]
    lps_affine = RAS_TO_LPS @ scan.volume.affine
    frames = [frame for index, header in enumerate(headers) for frame in _frames(index, header)]
    is_split = len(headers) > 1 and headers[0].SOPClassUID in _MULTI_FRAME
    if is_split and len(frames) != len(scan.source.frames or frames):
        raise _unsuitable(
            f"The volume consists of some frames of {len(headers)} multi-frame images.",
            expected="one multi-frame image, or several of which all frames belong to the volume.",
        )
    numbers_from_0 = () if is_split else scan.source.frames
    read = [frames[index] for index in numbers_from_0] or frames
    # The slices of a resampled scan are not images of the source, even at the same position.
    matched = [] if scan.source.resampled else _match_frames(read, headers[0], lps_affine, scan.volume.shape)
    images = tuple(_build_images(headers, frames, matched, lps_affine))
    return SourceSeries(
        images=images,
        positions=tuple(frame.position for frame in matched) if matched else None,
        frames=frozenset(index + 1 for index in numbers_from_0),
        lps_affine=lps_affine,
        content_time=_content_time(headers),
        evidence=tuple(map(_copy_attributes, headers)) if is_split else images,
        origins=tuple(_number_frames(headers)) if is_split else (),
        raw_texts=raw_texts[(matched or frames)[0].image],
        not_positioned=_frame_of_reference_fault(headers),
    )


def _read(path: Path) -> Dataset:
    return pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=_TAGS)


def _raw_texts(header: Dataset) -> dict[str, bytes]:
    """Return the bytes of the attributes of `TEXTS`, before pydicom decodes them."""
    elements = {name: header.get_item(name) for name in TEXTS if name in header}
    return {name: element.value for name, element in elements.items() if element and isinstance(element.value, bytes)}


def _check(headers: Sequence[Dataset]) -> None:
    missing = [name for name in _REQUIRED if not all(header.get(name) for header in headers)]
    if missing:
        raise _unsuitable(
            f"At least one image of the series has no {', '.join(missing)}.",
            expected="the UIDs of study, series and instance in every image.",
        )
    classes = {UID(header.get("SOPClassUID", "")) for header in headers}
    if len(classes) > 1 or not classes <= {*_SINGLE_FRAME, *_MULTI_FRAME}:
        names = ", ".join(sorted("unknown" if uid.is_private else uid.name for uid in classes))
        raise _unsuitable(f"The SOP class of the images is {names}.", expected="CT or MR images, classic or enhanced.")
    for name, keyword in (("studies", "StudyInstanceUID"), ("series", "SeriesInstanceUID")):
        count = len({header[keyword].value for header in headers})
        if count > 1:
            raise _unsuitable(f"The images belong to {count} {name}.", expected="one study and one series.")
    shared = len(headers) - len({header.SOPInstanceUID for header in headers})
    if shared:
        raise _unsuitable(
            f"{shared} images have the SOPInstanceUID of another image.", expected="a different one in each image."
        )


def _frame_of_reference_fault(headers: Sequence[Dataset]) -> UnsuitableSource | None:
    """Return why the images have no common frame of reference, or None if they have one."""
    found = {header.get("FrameOfReferenceUID") for header in headers}
    if not all(found):
        return _unsuitable("At least one image of the series has no FrameOfReferenceUID.", expected=_ONE_FRAME)
    if len(found) > 1:
        return _unsuitable(f"The images state {len(found)} frames of reference.", expected=_ONE_FRAME)
    return None


def _unsuitable(found: str, *, expected: str) -> UnsuitableSource:
    advice = "The other results are valid. For DICOM results, export the series again from the original."
    return UnsuitableSource(found, expected=expected, advice=advice)


def _frames(index: int, header: Dataset) -> list[_Frame]:
    """Return the frames of one image, in the order of the file."""
    frames = []
    for number in range(int(header.get("NumberOfFrames") or 1)):
        measures = functional_group(header, number, "PixelMeasuresSequence")
        spacing = measures.PixelSpacing
        frame = _Frame(
            image=index,
            position=functional_group(header, number, "PlanePositionSequence").ImagePositionPatient,
            orientation=functional_group(header, number, "PlaneOrientationSequence").ImageOrientationPatient,
            spacing=numbers(measures, "PixelSpacing")
            if isinstance(spacing, str)
            else spacing,  # some scanners write UT
            thickness=next(iter(optional_numbers(measures, "SliceThickness")), 0.0) or None,
        )
        frames.append(frame)
    return frames


def _number_frames(headers: Sequence[Dataset]) -> Iterator[tuple[str, int]]:
    """Yield SOPInstanceUID and number of each frame, in the order of `_frames`."""
    for header in headers:
        for number in range(int(header.get("NumberOfFrames") or 1)):
            yield str(header.SOPInstanceUID), number + 1


def _match_frames(
    frames: Sequence[_Frame], header: Dataset, lps_affine: Affine, shape: tuple[int, int, int]
) -> list[_Frame]:
    """Return the frame at the position of each slice of the scan, or an empty list if the grids differ.

    Frames are matched by position only, so the order in which they were read does not matter.
    """
    if (int(header.Columns), int(header.Rows)) != shape[:2]:
        return []
    spacing = np.linalg.norm(lps_affine[:3, :3], axis=0)
    cosines = (lps_affine[:3, :2] / spacing[:2]).T.ravel()  # (6,): direction of columns, then of rows
    candidates = [
        frame
        for frame in frames
        if np.abs(np.array(frame.orientation, dtype=float) - cosines).max() < SAME_DIRECTION
        and np.allclose(np.array(frame.spacing, dtype=float), spacing[[1, 0]], rtol=SAME_DIRECTION)
    ]
    if not candidates:
        return []
    available = np.array([frame.position for frame in candidates], dtype=float)  # (M, 3)
    required = lps_affine[:3, 3] + np.arange(shape[2])[:, None] * lps_affine[:3, 2]  # (N, 3)
    distances = np.linalg.norm(required[:, None] - available[None], axis=-1)  # (N, M)
    nearest = distances.argmin(axis=1)
    if len(set(nearest)) < len(nearest) or distances.min(axis=1).max() > SAME_POSITION_MM:
        return []
    return [candidates[i] for i in nearest]


def _build_images(
    headers: Sequence[Dataset], frames: Sequence[_Frame], matched: Sequence[_Frame], lps_affine: Affine
) -> list[Dataset]:
    """Return data sets with the copied attributes and with the orientation, spacing and thickness of the first slice.

    A segmentation has one orientation, spacing and thickness for all slices. The reader accepts only small differences
    between slices, and the thickness may be missing.
    """
    cosines = lps_affine[:3, :2] / np.linalg.norm(lps_affine[:3, :2], axis=0)
    # Of slices whose orientations jitter, the first with that of the scan.
    differences = [
        np.abs(np.array(frame.orientation, dtype=float) - cosines.T.ravel()).max().round(6) for frame in matched
    ]
    reference = matched[int(np.argmin(differences))] if matched else frames[0]
    slice_spacing = float(np.linalg.norm(lps_affine[:3, 2]))
    orientation = Dataset()
    orientation.ImageOrientationPatient = reference.orientation
    measures = Dataset()
    measures.PixelSpacing = reference.spacing
    measures.SliceThickness = format_number_as_ds(reference.thickness or slice_spacing)
    measures.SpacingBetweenSlices = format_number_as_ds(slice_spacing)
    if headers[0].SOPClassUID in _MULTI_FRAME:
        return [_build_multi_frame(headers[0], frames, orientation, measures)]
    images = []
    for frame in matched or frames:
        image = _copy_attributes(headers[frame.image])
        image.update(orientation)
        image.update(measures)
        image.ImagePositionPatient = frame.position
        images.append(image)
    return images


def _build_multi_frame(header: Dataset, frames: Sequence[_Frame], orientation: Dataset, measures: Dataset) -> Dataset:
    image = _copy_attributes(header)
    shared = Dataset()
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    image.NumberOfFrames = len(frames)
    image.SharedFunctionalGroupsSequence = [shared]
    image.PerFrameFunctionalGroupsSequence = [_position_group(frame.position) for frame in frames]
    return image


def _position_group(position: Sequence[float]) -> Dataset:
    plane, group = Dataset(), Dataset()
    plane.ImagePositionPatient = position
    group.PlanePositionSequence = [plane]
    return group


def _copy_attributes(header: Dataset) -> Dataset:
    """Copy the attributes of `COPIED`; a required attribute that is missing or invalid is left empty."""
    image = Dataset()
    for name in COPIED:
        if name in header:
            image[name] = header[name]
    for name in (*PATIENT, *STUDY):
        if name not in image:
            setattr(image, name, None)
    if image.PatientSex not in ("M", "F", "O"):
        image.PatientSex = None
    for name, value_type in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
        if _parse(value_type, image[name].value) is None:
            setattr(image, name, None)
    return image


def _content_time(headers: Sequence[Dataset]) -> tuple[dt.date, dt.time]:
    """Return the latest date and time of the first pair in `_TIMES` with both, else of the first with a date."""
    for default_time in (None, TM("000000")):
        for date_name, time_name in _TIMES:
            pairs = [
                (_parse(DA, header.get(date_name)), _parse(TM, header.get(time_name)) or default_time)
                for header in headers
            ]
            complete = [(date, time) for date, time in pairs if date is not None and time is not None]
            if complete:
                return max(complete)
    return NO_DATE


def _parse(value_type: Any, value: object) -> Any:
    """Return a date or time, or None if the value is empty or invalid."""
    try:
        return value_type(str(value)) if value else None
    except ValueError:
        return None
