"""What a DICOM file says of itself: what decides whether, and where, its frames belong."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.filereader import read_dataset, read_partial, read_preamble
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage

from app.errors import UnsafeArchive
from app.ingest.archive import CHUNK_BYTES
from app.ingest.attributes import functional_group, numbers, text, texts
from app.ingest.limits import Limits
from app.ingest.mosaic import TAGS as MOSAIC_TAGS
from app.ingest.mosaic import tiles_of
from app.ingest.plane import Kind, Plane

# Read these and nothing else: the header of a hospital's file can be larger than its image.
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
    "ComplexImageComponent",
    "EchoTime",
    "DiffusionBValue",
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
META_GROUP, PIXEL_GROUP = 0x0002, 0x7FE0


@dataclass(frozen=True)
class Header:
    """What one file holds.

    Attributes
    ----------
    rows, columns : int
        Of a frame; of one tile where the image is a Siemens mosaic.
    planes : tuple of Plane or None
        One a frame, or one a tile; None for a frame without a place in space.
    tiles : int
        Siemens mosaic: how many tiles are side by side; 0 for every other image.
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

    @property
    def is_image(self) -> bool:
        return self.rows > 0 and self.columns > 0 and len(self.planes) > 0

    @property
    def is_multi_frame(self) -> bool:
        return len(self.planes) > 1 and not self.tiles

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
        return self.samples == 1 and self.photometric in ("MONOCHROME1", "MONOCHROME2")

    @property
    def is_placed(self) -> bool:
        return None not in self.planes and _SCREENSHOTS.isdisjoint(self.image_type)


def read_headers(paths: Iterable[Path], limits: Limits) -> tuple[list[Header], list[str]]:
    """Read DICOM files up to their pixels.

    Parameters
    ----------
    paths : iterable of Path
    limits : Limits
        What a deflated file may become.

    Returns
    -------
    headers : list of Header
    damaged : list of str
        For each file that breaks off inside its header, or holds a value that DICOM does not allow:
        its SeriesInstanceUID where that can still be read, else an empty string.

    Raises
    ------
    UnsafeArchive
        A deflated file inflates without end.
    """
    headers, damaged = [], []
    for path in paths:
        header = _read(path, limits)
        if header is None:
            damaged.append(_series_of(path))
        else:
            headers.append(header)
    return headers, damaged


def _read(path: Path, limits: Limits) -> Header | None:
    try:
        check_deflated(path, limits)
        with path.open("rb") as file:
            pixels = _Pixels()
            dataset = read_partial(file, stop_when=pixels.begin_at, force=True, specific_tags=_TAGS)
        header = _header(path, dataset)
        # pydicom takes a file that breaks off for one that ends: an image's header lacks its end then.
        whole = pixels.begun or (header.is_image and header.is_placed) or not _is_of_an_image(dataset)
    except UnsafeArchive:
        raise
    except Exception:  # noqa: BLE001 - a broken header makes pydicom raise whatever its parts raise
        return None
    return header if whole else None


class _Pixels:
    """Whether a file has any: told of each of its elements."""

    begun = False

    def begin_at(self, tag: BaseTag, _vr: str | None, _length: int) -> bool:
        self.begun |= tag.group == PIXEL_GROUP
        return self.begun


def _is_of_an_image(dataset: pydicom.FileDataset) -> bool:
    """By its SOP class; a file that does not even say that breaks off before it."""
    if dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return False
    if not dataset.get("SOPInstanceUID"):  # it follows the class
        return True
    kind = UID(text(dataset, "SOPClassUID"))
    return not kind.is_private and (not kind.keyword or kind.keyword.endswith("ImageStorage"))


def _series_of(path: Path) -> str:
    """SeriesInstanceUID of a damaged file, if it comes before the damage."""
    try:
        with path.open("rb") as file:
            wanted = Tag("SeriesInstanceUID")
            dataset = read_partial(file, stop_when=lambda tag, *_: tag > wanted, force=True, specific_tags=[wanted])
            return text(dataset, "SeriesInstanceUID")
    except Exception:  # noqa: BLE001 - as above
        return ""


def check_deflated(path: Path, limits: Limits) -> None:
    """Refuse a deflated data set that inflates without end: pydicom inflates it in one piece.

    Raises
    ------
    UnsafeArchive
        More than `limits.max_inflated_bytes`.
    """
    with path.open("rb") as file:
        read_preamble(file, force=True)
        meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=_after_meta)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        inflater, count = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while chunk := inflater.unconsumed_tail or file.read(CHUNK_BYTES):
            count += len(inflater.decompress(chunk, CHUNK_BYTES))
            if count > limits.max_inflated_bytes:
                raise UnsafeArchive(
                    f"A deflated DICOM file inflates to more than {limits.max_inflated_bytes / 1e6:.0f} MB.",
                    expected="a DICOM series.",
                    advice="Export the series uncompressed.",
                )


def _after_meta(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return tag.group != META_GROUP


def _header(path: Path, dataset: pydicom.Dataset) -> Header:
    image_type = tuple(map(str.upper, texts(dataset, "ImageType")))
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    planes, tiles = _planes(dataset), 0
    if "MOSAIC" in image_type:
        planes, tiles = tiles_of(dataset) or ((None,), 0)
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
    )


def _planes(dataset: pydicom.Dataset) -> tuple[Plane | None, ...]:
    count = int(dataset.get("NumberOfFrames") or 1)
    # Each frame of an enhanced image has its own group; without one, no frame has a place.
    groups = len(dataset.get("PerFrameFunctionalGroupsSequence", []))
    return tuple(_plane(dataset, frame) for frame in range(count)) if count in (1, groups) else (None,)


def _plane(dataset: pydicom.Dataset, frame: int) -> Plane | None:
    measures = functional_group(dataset, frame, "PixelMeasuresSequence")
    position = numbers(functional_group(dataset, frame, "PlanePositionSequence"), "ImagePositionPatient")
    orientation = numbers(functional_group(dataset, frame, "PlaneOrientationSequence"), "ImageOrientationPatient")
    spacing = numbers(measures, "PixelSpacing")
    if (len(position), len(orientation), len(spacing)) != (3, 6, 2):
        return None
    thickness = measures.get("SliceThickness")
    return Plane(position, orientation, spacing, float(thickness) if thickness else None, _kind(dataset, frame))


def _kind(dataset: pydicom.Dataset, frame: int) -> Kind:
    echo = functional_group(dataset, frame, "MREchoSequence")
    b_value = numbers(functional_group(dataset, frame, "MRDiffusionSequence"), "DiffusionBValue")
    echo_ms = numbers(echo, "EffectiveEchoTime") or numbers(echo, "EchoTime")
    frame_type = functional_group(dataset, frame, "MRImageFrameTypeSequence")
    # Classic images have it as third or later value of the image type (Siemens, Philips).
    said = [text(frame_type, "ComplexImageComponent").upper(), *map(str.upper, texts(dataset, "ImageType")[2:])]
    component = next((_COMPONENTS[word] for word in said if word in _COMPONENTS), "")
    return Kind(component, echo_ms[0] if echo_ms else None, b_value[0] if b_value else None)
