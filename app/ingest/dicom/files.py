"""Read from DICOM files the header attributes that select and order their frames."""

import hashlib
import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID, MediaStorageDirectoryStorage

from app.dicom_attributes import functional_group, numbers, optional_numbers, text, texts
from app.errors import CounterpartError
from app.ingest.dicom.deflated import check_deflated
from app.ingest.dicom.geometry import AcquisitionKey, Plane
from app.ingest.dicom.mosaic import MOSAIC_TAGS, locate_tiles
from app.ingest.limits import HEAD_BYTES, Limits, is_blank

# Compared to find two patients in one upload. Their values never leave this module.
_PATIENT = ("PatientID", "PatientName", "PatientBirthDate")
# Only these are read: the header of a clinical file can be larger than its image.
_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "ImageType",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "AcquisitionNumber",
    "ComplexImageComponent",
    "EchoTime",
    "DiffusionBValue",
    *_PATIENT,
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
_TAGS: list[BaseTag | int] = [*(Tag(keyword) for keyword in _KEYWORDS), *MOSAIC_TAGS]
_LOCALIZERS = {"LOCALIZER", "SCOUT"}
_SCREENSHOTS = {"SCREEN SAVE", "SCREENSHOT"}
_COMPONENTS = {
    **dict.fromkeys(("P", "PHASE", "PHASE MAP"), "phase"),
    **dict.fromkeys(("R", "REAL"), "real"),
    **dict.fromkeys(("I", "IMAGINARY"), "imaginary"),
}
# Contrasts of a Dixon acquisition in ImageType or FrameType, of Philips, Siemens and GE.
_DIXON = {
    **dict.fromkeys(("W", "WATER"), "water"),
    **dict.fromkeys(("F", "FAT"), "fat"),
    **dict.fromkeys(("IP", "IN_PHASE", "IN PHASE", "INPHASE"), "in phase"),
    **dict.fromkeys(("OP", "OPP_PHASE", "OUT_PHASE", "OUT_OF_PHASE", "OUT OF PHASE", "OUTPHASE"), "out of phase"),
}
PIXEL_GROUP = 0x7FE0
# Key of the hashes of patient details: they are different in each process, and never stored.
_HASH_KEY = secrets.token_bytes(32)


@dataclass(frozen=True)
class Header:
    """Header of one DICOM file.

    Attributes
    ----------
    path : Path
    instance, series, frame_of_reference : str
        SOPInstanceUID, SeriesInstanceUID and FrameOfReferenceUID; empty if absent.
    modality, photometric : str
        Modality and PhotometricInterpretation; empty if absent.
    image_type : tuple of str
        Values of ImageType in upper case.
    rows, columns : int
        Size of a frame, or of one tile of a Siemens mosaic.
    samples : int
        SamplesPerPixel: 1 for grey, 3 for colour.
    planes : tuple of Plane or None
        Position of each frame, or of each tile of a mosaic; None for a frame without a position.
    tiles : int
        Number of tiles along one side of a Siemens mosaic; 0 for every other image.
    patient : tuple of str
        Keyed hashes of PatientID, PatientName and PatientBirthDate; an empty string for an empty value.
    invalid : tuple of str
        Keywords of the position attributes whose value is not a number. Their frames have no position.
    """

    path: Path
    instance: str
    series: str
    frame_of_reference: str
    modality: str
    image_type: tuple[str, ...]
    rows: int
    columns: int
    photometric: str
    samples: int
    planes: tuple[Plane | None, ...]
    tiles: int = 0
    patient: tuple[str, ...] = ()
    invalid: tuple[str, ...] = ()

    @property
    def is_image(self) -> bool:
        return self.rows > 0 and self.columns > 0 and len(self.planes) > 0

    @property
    def is_multi_frame(self) -> bool:
        return len(self.planes) > 1 and not self.tiles

    @property
    def is_volume(self) -> bool:
        """True if the file contains several slices."""
        return len(self.planes) > 1

    @property
    def is_localizer(self) -> bool:
        return not _LOCALIZERS.isdisjoint(self.image_type)

    @property
    def is_derived(self) -> bool:
        return self.image_type[:1] == ("DERIVED",)

    @property
    def is_mosaic(self) -> bool:
        return "MOSAIC" in self.image_type

    @property
    def is_grey(self) -> bool:
        return self.samples == 1 and self.photometric in ("MONOCHROME1", "MONOCHROME2", "")

    @property
    def is_screenshot(self) -> bool:
        return not _SCREENSHOTS.isdisjoint(self.image_type)

    @property
    def is_placed(self) -> bool:
        return None not in self.planes and not self.is_screenshot


def read_headers(paths: Iterable[Path], limits: Limits) -> tuple[list[Header], list[str]]:
    """Read the headers of DICOM files, up to the pixel data.

    Parameters
    ----------
    paths : iterable of Path
    limits : Limits
        Limits for a deflated file.

    Returns
    -------
    headers : list of Header
        Headers of the readable files.
    damaged : list of str
        One item for each file that is empty, ends inside its header or contains a value that DICOM does not allow: its
        SeriesInstanceUID, or an empty string if that cannot be read.

    Raises
    ------
    UnsafeArchive
        If the deflated files inflate to more than the limit in all, or one of them to many times its size.
    TooManyVoxels
        If a Siemens mosaic announces more pixels or tiles than the limit.
    """
    headers, damaged = [], []
    remaining = limits.max_inflated_bytes
    for path in paths:
        header, inflated = _read_header(path, remaining, limits)
        remaining -= inflated
        if header is None:
            damaged.append(_series_uid(path))
        else:
            headers.append(header)
    return headers, damaged


def _read_header(path: Path, max_inflated_bytes: int, limits: Limits) -> tuple[Header | None, int]:
    """Return the header of a file, or None if it is damaged, and its inflated bytes if it is deflated."""
    inflated = 0
    try:
        with path.open("rb") as file:
            if is_blank(file.read(HEAD_BYTES)):
                return None, 0  # pydicom would read it as a data set without elements
        inflated = check_deflated(path, max_inflated_bytes, limits)
        with path.open("rb") as file:
            pixel_data = _PixelDataDetector()
            dataset = read_partial(file, stop_when=pixel_data.is_reached, force=True, specific_tags=_TAGS)
        header = _parse_header(path, dataset, limits)
        # pydicom reads a truncated file without an error. The header of a truncated image has no pixel data.
        is_complete = pixel_data.found or (header.is_image and header.is_placed) or not _is_image_class(dataset)
    except CounterpartError:
        raise
    except Exception:  # noqa: BLE001 - for a damaged header, pydicom raises whatever its parts raise
        return None, inflated
    return header if is_complete else None, inflated


class _PixelDataDetector:
    """Detector for the group of the pixel data, called by pydicom for each element of a file."""

    found = False

    def is_reached(self, tag: BaseTag, _vr: str | None, _length: int) -> bool:
        self.found |= tag.group == PIXEL_GROUP
        return self.found


def hash_pixels(path: Path) -> bytes:
    """Return a hash of the stored pixel data of a file, of its whole content if that cannot be read."""
    try:
        dataset = pydicom.dcmread(
            path, force=True, specific_tags=["PixelData", "FloatPixelData", "DoubleFloatPixelData"]
        )
        data = next(element.value for element in dataset if element.tag.group == PIXEL_GROUP)
    except Exception:  # noqa: BLE001 - as in `_read_header`
        data = path.read_bytes()
    return hashlib.sha256(data).digest()


def _is_image_class(dataset: pydicom.FileDataset) -> bool:
    """Return True if the SOP class is one of images, or is missing because the file ends before it."""
    if dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return False
    if not dataset.get("SOPInstanceUID"):  # it follows the SOP class
        return True
    sop_class = UID(text(dataset, "SOPClassUID"))
    return not sop_class.is_private and (not sop_class.keyword or sop_class.keyword.endswith("ImageStorage"))


def _series_uid(path: Path) -> str:
    """Return the SeriesInstanceUID of a damaged file, or an empty string if it comes after the damage."""
    try:
        with path.open("rb") as file:
            last = Tag("SeriesInstanceUID")
            dataset = read_partial(file, stop_when=lambda tag, *_: tag > last, force=True, specific_tags=[last])
            return text(dataset, "SeriesInstanceUID")
    except Exception:  # noqa: BLE001 - as in `_read_header`
        return ""


def _parse_header(path: Path, dataset: pydicom.Dataset, limits: Limits) -> Header:
    image_type = tuple(map(str.upper, texts(dataset, "ImageType")))
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    invalid: dict[str, None] = {}
    planes, tiles = _locate_frames(dataset, invalid), 0
    if "MOSAIC" in image_type:
        planes, tiles = locate_tiles(dataset, limits) or ((None,), 0)
        rows, columns = rows // max(tiles, 1), columns // max(tiles, 1)
    return Header(
        path=path,
        instance=text(dataset, "SOPInstanceUID"),
        series=text(dataset, "SeriesInstanceUID"),
        frame_of_reference=text(dataset, "FrameOfReferenceUID"),
        modality=text(dataset, "Modality"),
        image_type=image_type,
        rows=rows,
        columns=columns,
        photometric=text(dataset, "PhotometricInterpretation"),
        samples=int(dataset.get("SamplesPerPixel") or 1),
        planes=planes,
        tiles=tiles,
        invalid=tuple(invalid),
        patient=tuple(_hash_patient_detail(dataset, keyword) for keyword in _PATIENT),
    )


def _hash_patient_detail(dataset: pydicom.Dataset, keyword: str) -> str:
    """Return a keyed hash of a patient's ID, name or birth date, or an empty string if it is empty or unreadable.

    Two spellings of one name are equal: only the alphabetic component group is compared, without case, blanks and
    empty components.
    """
    try:
        value = text(dataset, keyword)
    except Exception:  # noqa: BLE001 - an unreadable name does not make an image unusable
        return ""
    if keyword == "PatientName":
        value = " ".join(value.partition("=")[0].replace("^", " ").split()).casefold()
    return hashlib.blake2b(value.encode(errors="replace"), key=_HASH_KEY).hexdigest() if value else ""


def _locate_frames(dataset: pydicom.Dataset, invalid: dict[str, None]) -> tuple[Plane | None, ...]:
    count = int(dataset.get("NumberOfFrames") or 1)
    # Each frame of an enhanced image has its own item; without the items, no frame has a position.
    items = len(dataset.get("PerFrameFunctionalGroupsSequence", []))
    if count not in (1, items):
        return (None,)
    return tuple(_locate_frame(dataset, frame, invalid) for frame in range(count))


def _position_numbers(dataset: pydicom.Dataset, keyword: str, invalid: dict[str, None]) -> tuple[float, ...]:
    """Return the values of a position attribute; add its keyword to `invalid` if one is not a number."""
    try:
        return numbers(dataset, keyword)
    except Exception:  # noqa: BLE001 - pydicom raises different exceptions for different values
        invalid[keyword] = None
        return ()


def _locate_frame(dataset: pydicom.Dataset, frame: int, invalid: dict[str, None]) -> Plane | None:
    measures = functional_group(dataset, frame, "PixelMeasuresSequence")
    placed = functional_group(dataset, frame, "PlanePositionSequence")
    oriented = functional_group(dataset, frame, "PlaneOrientationSequence")
    position = _position_numbers(placed, "ImagePositionPatient", invalid)
    orientation = _position_numbers(oriented, "ImageOrientationPatient", invalid)
    spacing = _position_numbers(measures, "PixelSpacing", invalid)
    if (len(position), len(orientation), len(spacing)) != (3, 6, 2):
        return None
    thickness = next(iter(optional_numbers(measures, "SliceThickness")), 0.0) or None
    key, number = _acquisition_key(dataset, frame), _acquisition_number(dataset, frame)
    return Plane(position, orientation, spacing, thickness, key, number)


def _acquisition_number(dataset: pydicom.Dataset, frame: int) -> int | None:
    content = functional_group(dataset, frame, "FrameContentSequence")
    stated = optional_numbers(content, "FrameAcquisitionNumber") or optional_numbers(dataset, "AcquisitionNumber")
    return int(stated[0]) if stated and math.isfinite(stated[0]) else None


def _acquisition_key(dataset: pydicom.Dataset, frame: int) -> AcquisitionKey:
    echo = functional_group(dataset, frame, "MREchoSequence")
    b_value = optional_numbers(functional_group(dataset, frame, "MRDiffusionSequence"), "DiffusionBValue")
    echo_ms = optional_numbers(echo, "EffectiveEchoTime") or optional_numbers(echo, "EchoTime")
    frame_type = functional_group(dataset, frame, "MRImageFrameTypeSequence")
    # Single-frame images of Siemens and Philips state the component as the third or a later value of ImageType.
    values = [text(frame_type, "ComplexImageComponent").upper(), *map(str.upper, texts(dataset, "ImageType")[2:])]
    component = next((_COMPONENTS[value] for value in values if value in _COMPONENTS), "")
    values += [value.upper() for value in texts(frame_type, "FrameType")[2:]]
    contrast = next((_DIXON[value] for value in values if value in _DIXON), "")
    return AcquisitionKey(component, echo_ms[0] if echo_ms else None, b_value[0] if b_value else None, contrast)
