"""Single DICOM instances for DICOMweb: their identity, their attributes as DICOM JSON, and their frames."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.encaps import get_frame
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRColorImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
)

from app.dicom_attributes import silence_libraries
from app.ingest.dicom.deflated import check_deflated, read_first_elements
from app.ingest.limits import DEFAULT_LIMITS

# SOP classes that `POST /dicomweb/studies` stores.
IMAGE_CLASSES = (
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    MRImageStorage,
    EnhancedMRImageStorage,
    EnhancedMRColorImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
)
# Only this many bytes of a deflated data set are inflated to find its UIDs. Details of the patient and of the
# acquisition precede them.
UID_BYTES = 1 << 22
DicomJson = dict[str, dict[str, Any]]


def tag_of(name: str) -> str | None:
    """Return the tag of a keyword as DICOM JSON writes it, a tag unchanged, or None for another text."""
    if len(name) == 8 and set(name) <= set("0123456789abcdefABCDEF"):
        return name.upper()
    tag = tag_for_keyword(name)
    return None if tag is None else f"{tag:08X}"


def vr_of(tag: str) -> str:
    """Return the value representation of a public tag of eight hexadecimal digits, such as "DA"."""
    return dictionary_VR(int(tag, 16))


_UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")


@dataclass(frozen=True)
class Instance:
    """UIDs of one instance."""

    sop_class: str
    uid: str
    study: str
    series: str

    @property
    def is_image(self) -> bool:
        """Return whether the instance is a CT or MR image."""
        return self.sop_class in IMAGE_CLASSES


def identify(path: Path) -> Instance | None:
    """Return the UIDs of a file, or None if it is not a DICOM file with all four.

    A deflated file that inflates to more than the limits of an upload has None too.
    """
    try:
        is_deflated = check_deflated(path, DEFAULT_LIMITS.max_inflated_bytes, DEFAULT_LIMITS) > 0
        with silence_libraries():
            if is_deflated:
                dataset = read_first_elements(path, [Tag(name) for name in _UIDS], UID_BYTES)
            else:
                dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_UIDS))
            values = [str(dataset[name].value) for name in _UIDS]
    except Exception:  # noqa: BLE001 - for a damaged header, pydicom raises whatever its parts raise
        return None
    return Instance(*values) if all(UID(value).is_valid for value in values) else None


def read_attributes(path: Path, keywords: Collection[str] | None = None) -> DicomJson:
    """Return the attributes of a file in the DICOM JSON model (PS3.18 annex F), without pixel data.

    NaN and infinities become empty values (F.2.5): JSON has no such numbers, and F.2.3 allows no text for them.

    Parameters
    ----------
    path : Path
    keywords : collection of str, optional
        Keywords of the attributes. By default, all that come before the pixel data.
    """
    tags = None if keywords is None else [*keywords, "SpecificCharacterSet"]
    with silence_libraries():
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
        document: DicomJson = dataset.to_json_dict(suppress_invalid_tags=True)
    _remove_special_numbers(document)
    document["00080005"] = {"vr": "CS", "Value": ["ISO_IR 192"]}  # JSON is UTF-8
    document["00083002"] = {"vr": "UI", "Value": [str(_transfer_syntax(dataset))]}
    return document


def _remove_special_numbers(document: DicomJson) -> None:
    """Replace NaN and infinities by empty values, also in sequences. The other values keep their positions."""
    for element in document.values():
        values = element.get("Value", [])
        if element["vr"] == "SQ":
            for item in values:
                _remove_special_numbers(item)
            continue
        finite = [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]
        if finite != values:
            element["Value"] = finite
            if set(finite) == {None}:
                del element["Value"]


def read_frames(path: Path, numbers: Collection[int]) -> tuple[str, list[bytes]]:
    """Return the transfer syntax and the stored bytes of frames, counted from 1.

    Frames of one bit per pixel are padded to whole bytes.

    Raises
    ------
    IndexError
        The file has no pixel data, or no frame with this number.
    """
    with silence_libraries():
        dataset = pydicom.dcmread(path)
        count = int(dataset.get("NumberOfFrames") or 1)
        if "PixelData" not in dataset or not all(1 <= number <= count for number in numbers):
            raise IndexError
        syntax = _transfer_syntax(dataset)
        if syntax.is_encapsulated:
            data = dataset.PixelData
            return str(syntax), [get_frame(data, number - 1, number_of_frames=count) for number in numbers]
        return str(syntax), list(_native_frames(dataset, numbers))


def _transfer_syntax(dataset: pydicom.FileDataset) -> UID:
    """Return the transfer syntax of a file: the stated one, or the one with which pydicom reads a file without."""
    stated = dataset.file_meta.get("TransferSyntaxUID")
    if stated:
        return UID(stated)
    is_implicit, _ = dataset.original_encoding
    return ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian


def _native_frames(dataset: pydicom.Dataset, numbers: Collection[int]) -> Iterator[bytes]:
    bits = dataset.Rows * dataset.Columns * dataset.SamplesPerPixel * dataset.BitsAllocated
    for number in numbers:
        start, stop = (number - 1) * bits, number * bits
        if bits % 8 == 0:
            yield dataset.PixelData[start // 8 : stop // 8]
        else:  # frames of one bit per pixel follow each other without padding (PS3.5 8.1.1)
            part = np.frombuffer(dataset.PixelData[start // 8 : -(-stop // 8)], np.uint8)
            pixels = np.unpackbits(part, bitorder="little")[start % 8 :][:bits]
            yield np.packbits(pixels, bitorder="little").tobytes()
