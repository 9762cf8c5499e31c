"""What of the source series an object repeats: what the standard requires (type 1 and 2), and nothing else.

highdicom copies every patient and study attribute that it finds in a source. It is given data sets
that hold no others than these.
"""

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
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

from app.errors import UnsuitableSource
from app.volume import Affine, Scan

Vector = npt.NDArray[np.float64]

PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber")
SERIES = ("SeriesInstanceUID", "Modality", "FrameOfReferenceUID", "PositionReferenceIndicator")
INSTANCE = ("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Rows", "Columns")
# Required of what is derived from a lossy image (PS3.3 C.7.6.1.1.5).
LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
COPIED = (*PATIENT, *STUDY, *SERIES, *INSTANCE, *LOSSY)
# Read, but not copied as they stand.
_PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
_GROUPS = ("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# When the pixels came to be, best first; each pair is type 1 or 2 in some image that is read.
_TIMES = (
    ("ContentDate", "ContentTime"),
    ("AcquisitionDate", "AcquisitionTime"),
    ("SeriesDate", "SeriesTime"),
    ("StudyDate", "StudyTime"),
)
_TAGS = [Tag(name) for name in (*COPIED, *_PLACE, *_GROUPS, *(name for pair in _TIMES for name in pair))]
# Content Date is required: of a source without any date (an anonymised one) it says so by being absurd.
NO_DATE = (DA("19000101"), TM("000000"))

_SINGLE_FRAME = (CTImageStorage, MRImageStorage)
_MULTI_FRAME = (
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
)
_REQUIRED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Ingest takes slices that are up to 0.2 mm off a straight line and 0.05 mm off an even distance.
SAME_PLACE_MM = 0.3
SAME_DIRECTION = 2e-3


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """A series as highdicom takes it, and where its slices lie in the scan.

    Attributes
    ----------
    images : tuple of Dataset
        One a slice, in the order of the scan's last axis; or the one multi-frame image.
    positions : tuple of sequence, or None
        ImagePositionPatient of each slice of the scan, as the source states it. None: the scan's
        slices are not images or frames of the source (they were resampled, or are tiles of a mosaic).
    frames : frozenset of int
        Numbers, from 1, of the frames of a multi-frame image that were read.
    lps : (4, 4) ndarray
        Scan indices (column, row, slice) to LPS millimetres.
    content_time : (DA, TM)
        The latest that the source states for its pixels: a clock would make every object another.
    """

    images: tuple[Dataset, ...]
    positions: tuple[Sequence[float], ...] | None
    frames: frozenset[int]
    lps: Affine
    content_time: tuple[dt.date, dt.time]

    @property
    def uid(self) -> str:
        """SeriesInstanceUID."""
        return str(self.images[0].SeriesInstanceUID)


@dataclass(frozen=True, eq=False)
class _Frame:
    """One frame of a source file; the numbers stay as they are written."""

    image: int
    position: Sequence[float]
    orientation: Sequence[float]
    spacing: Sequence[float]
    thickness: float | None


def read_source(scan: Scan) -> SourceSeries:
    """Read the headers of a scan's series again, and find each slice's frame.

    Raises
    ------
    UnsuitableSource
        Nothing can refer to the series: UIDs are missing, or its kind of image is unknown.
    """
    headers = [_read(path) for path in scan.source.instances]
    _check(headers)
    lps = RAS_TO_LPS @ scan.volume.affine
    frames = [frame for index, header in enumerate(headers) for frame in _frames(index, header)]
    read = [frames[index] for index in scan.source.frames] or frames
    # A resampled slice may lie as near to one of the source as two of one place; it is another.
    chosen = [] if scan.source.resampled else _match(read, headers[0], lps, scan.volume.shape)
    images = _images(headers, frames, chosen, lps)
    return SourceSeries(
        images=tuple(images),
        positions=tuple(frame.position for frame in chosen) if chosen else None,
        frames=frozenset(index + 1 for index in scan.source.frames),
        lps=lps,
        content_time=_content_time(headers),
    )


def _read(path: Path) -> Dataset:
    return pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=_TAGS)


def _check(headers: Sequence[Dataset]) -> None:
    missing = [name for name in _REQUIRED if not all(header.get(name) for header in headers)]
    if missing:
        raise _unsuitable(
            f"The series does not state {', '.join(missing)} in every image.",
            expected="an image that others can refer to: UIDs of study, series, instance and frame of reference.",
        )
    classes = {UID(header.get("SOPClassUID", "")) for header in headers}
    if len(classes) > 1 or not classes <= {*_SINGLE_FRAME, *_MULTI_FRAME}:
        names = ", ".join(sorted("unknown" if kind.is_private else kind.name for kind in classes))
        raise _unsuitable(f"The images are of the kind {names}.", expected="CT or MR images, single-frame or enhanced.")
    if classes <= {*_MULTI_FRAME} and len(headers) > 1:
        raise _unsuitable(
            f"The volume is spread over {len(headers)} multi-frame images.",
            expected="one enhanced multi-frame image, or single-frame images.",
        )
    studies = {header.StudyInstanceUID for header in headers}
    if len(studies) > 1:
        raise _unsuitable(f"The images name {len(studies)} studies.", expected="one study.")


def _unsuitable(found: str, *, expected: str) -> UnsuitableSource:
    advice = "The other results stand. Export the series again from the original for DICOM results."
    return UnsuitableSource(found, expected=expected, advice=advice)


def _frames(index: int, header: Dataset) -> list[_Frame]:
    """Frames of one image, in its own order."""
    frames = []
    for number in range(int(header.get("NumberOfFrames") or 1)):
        measures = _group(header, number, "PixelMeasuresSequence")
        thickness = measures.get("SliceThickness")
        frame = _Frame(
            image=index,
            position=_group(header, number, "PlanePositionSequence").ImagePositionPatient,
            orientation=_group(header, number, "PlaneOrientationSequence").ImageOrientationPatient,
            spacing=measures.PixelSpacing,
            thickness=float(thickness) if thickness else None,
        )
        frames.append(frame)
    return frames


def _group(header: Dataset, frame: int, keyword: str) -> Dataset:
    """Where a frame's attributes stand: its own group, the shared one, or the data set itself."""
    for group in (
        *header.get("PerFrameFunctionalGroupsSequence", [])[frame : frame + 1],
        *header.get("SharedFunctionalGroupsSequence", [])[:1],
    ):
        if group.get(keyword):
            item: Dataset = group[keyword][0]
            return item
    return header


def _match(frames: Sequence[_Frame], header: Dataset, lps: Affine, shape: tuple[int, int, int]) -> list[_Frame]:
    """The frame at the place of each slice of the scan; empty where the grid is another.

    By position alone, whatever order the reader left them in: a slice is never guessed.
    """
    if (int(header.Columns), int(header.Rows)) != shape[:2]:
        return []
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = (lps[:3, :2] / spacing[:2]).T.ravel()  # (6,): direction of columns, then of rows
    candidates = [
        frame
        for frame in frames
        if np.abs(np.array(frame.orientation, dtype=float) - cosines).max() < SAME_DIRECTION
        and np.allclose(np.array(frame.spacing, dtype=float), spacing[[1, 0]], rtol=SAME_DIRECTION)
    ]
    if not candidates:
        return []
    places = np.array([frame.position for frame in candidates], dtype=float)  # (M, 3)
    wanted = lps[:3, 3] + np.arange(shape[2])[:, None] * lps[:3, 2]  # (N, 3)
    distances = np.linalg.norm(wanted[:, None] - places[None], axis=-1)  # (N, M)
    nearest = distances.argmin(axis=1)
    if len(set(nearest)) < len(nearest) or distances.min(axis=1).max() > SAME_PLACE_MM:
        return []
    return [candidates[i] for i in nearest]


def _images(
    headers: Sequence[Dataset], frames: Sequence[_Frame], chosen: Sequence[_Frame], lps: Affine
) -> list[Dataset]:
    """Data sets with what is copied, and one orientation, spacing and thickness for all slices.

    A segmentation states them once: those of the first slice. Other slices differ by less than
    `ingest.stack` allows, and thickness may be absent.
    """
    reference = chosen[0] if chosen else frames[0]
    between = float(np.linalg.norm(lps[:3, 2]))
    orientation = Dataset()
    orientation.ImageOrientationPatient = reference.orientation
    measures = Dataset()
    measures.PixelSpacing = reference.spacing
    measures.SliceThickness = format_number_as_ds(reference.thickness or between)
    measures.SpacingBetweenSlices = format_number_as_ds(between)
    if headers[0].SOPClassUID in _MULTI_FRAME:
        return [_multi_frame(headers[0], frames, orientation, measures)]
    images = []
    for frame in chosen or frames:
        image = _copied(headers[frame.image])
        image.update(orientation)
        image.update(measures)
        image.ImagePositionPatient = frame.position
        images.append(image)
    return images


def _multi_frame(header: Dataset, frames: Sequence[_Frame], orientation: Dataset, measures: Dataset) -> Dataset:
    image = _copied(header)
    shared = Dataset()
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    image.NumberOfFrames = len(frames)
    image.SharedFunctionalGroupsSequence = [shared]
    image.PerFrameFunctionalGroupsSequence = [_at(frame.position) for frame in frames]
    return image


def _at(position: Sequence[float]) -> Dataset:
    place, group = Dataset(), Dataset()
    place.ImagePositionPatient = position
    group.PlanePositionSequence = [place]
    return group


def _copied(header: Dataset) -> Dataset:
    """The attributes of `COPIED`; what is required and may be empty is empty where the source's value is wrong."""
    image = Dataset()
    for name in COPIED:
        if name in header:
            image[name] = header[name]
    for name in (*PATIENT, *STUDY):
        if name not in image:
            setattr(image, name, None)
    if image.PatientSex not in ("M", "F", "O"):
        image.PatientSex = None
    for name, kind in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
        if _parsed(kind, image[name].value) is None:
            setattr(image, name, None)
    return image


def _content_time(headers: Sequence[Dataset]) -> tuple[dt.date, dt.time]:
    """The latest moment of the best kind that is stated whole; else the best date, at midnight."""
    for midnight in (None, TM("000000")):
        for date, time in _TIMES:
            stated = [(_parsed(DA, header.get(date)), _parsed(TM, header.get(time)) or midnight) for header in headers]
            whole = [(day, moment) for day, moment in stated if day is not None and moment is not None]
            if whole:
                return max(whole)
    return NO_DATE


def _parsed(kind: Any, value: object) -> Any:
    """A date or a time, or None for what is none."""
    try:
        return kind(str(value)) if value else None
    except ValueError:
        return None
