"""Decode stored pixels into the scan's own units (Hounsfield units for CT).

Importing this module also chooses pydicom's decoders: it adds one for 12-bit JPEG and removes a faulty one.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import gdcm
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import (
    DecodeRunner,
    JPEGExtended12BitDecoder,
    JPEGLSLosslessDecoder,
    JPEGLSNearLosslessDecoder,
    get_decoder,
)
from pydicom.pixels.processing import apply_modality_lut
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGExtended12Bit

from app.dicom_attributes import functional_group
from app.errors import CounterpartError, InvalidHeader, NoImageInArchive, TruncatedFile, UnsupportedPixels
from app.ingest.dicom.codestream import announced_size
from app.ingest.dicom.mosaic import split_tiles
from app.volume import FloatArray

# Air has -1000 HU. A CT whose lowest value is above this is not in Hounsfield units.
MAX_AIR_HU = -500

StoredPixels = npt.NDArray[np.generic]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Frame:
    """One frame of a file, or one tile of a mosaic.

    Attributes
    ----------
    path : Path
    index : int
        Index of the frame or tile, from 0.
    tiles : int
        Number of tiles along one side of a mosaic; 0 for every other image.
    """

    path: Path
    index: int
    tiles: int = 0


@dataclass
class _Extremes:
    """Smallest stored value of signed images with their limit, and largest value of unsigned images.

    A wrong PixelRepresentation shows large values as negative ones. Single images cannot show that, but a series whose
    images disagree can.
    """

    lowest_signed: int = 0
    highest_unsigned: int = 0
    signed_limit: int = 1 << 31

    def add(self, dataset: pydicom.Dataset, stored: StoredPixels) -> None:
        """Add the pixels of a file."""
        if dataset.get("PixelRepresentation"):
            self.lowest_signed = min(self.lowest_signed, int(stored.min()))
            self.signed_limit = min(self.signed_limit, 1 << (int(dataset.get("BitsStored") or 16) - 1))
        else:
            self.highest_unsigned = max(self.highest_unsigned, int(stored.max()))

    def check(self) -> None:
        """Refuse a series in which unsigned values exceed the signed range, and other images have negative values.

        Raises
        ------
        InvalidHeader
        """
        if self.lowest_signed < 0 and self.highest_unsigned >= self.signed_limit:
            raise InvalidHeader(
                "The images of the series disagree about the sign of their values (PixelRepresentation): some have "
                "negative values, and others have values that a signed image cannot store.",
                expected="one PixelRepresentation in the whole series.",
                advice="Export the series again from the original.",
            )


def read_frames(frames: Sequence[Frame], rows: int, columns: int) -> tuple[FloatArray, tuple[str, ...]]:
    """Decode frames into one array.

    Parameters
    ----------
    frames : sequence of Frame
        In the order of the volume's last axis.
    rows, columns : int
        Size of each frame.

    Returns
    -------
    values : (columns, rows, N) ndarray of float32
        Modality rescale or look-up table applied (PS3.3 C.11.1). The grey scale of an inverted MR (MONOCHROME1)
        is inverted back. Pixel padding is set to the smallest other value.
    notes : tuple of str
        Sentences that describe these changes, for the report.

    Raises
    ------
    UnsupportedPixels
        If there is no decoder for the compression.
    InvalidHeader
        If a CT states no conversion to Hounsfield units and does not look like it, or if some images state a wrong
        PixelRepresentation.
    NoImageInArchive
        If a file has no pixel data.
    TruncatedFile
        If pixel data is incomplete or damaged.
    """
    stack = np.empty((len(frames), rows, columns), dtype=np.float32)
    padded, inverted, unscaled, assumed = 0, False, 0, False
    opened: tuple[Path, pydicom.Dataset, StoredPixels] | None = None
    extremes = _Extremes()
    for k, frame in enumerate(frames):
        if opened is None or opened[0] != frame.path:  # frames of one file are mostly neighbours
            opened = (frame.path, *_decode_file(frame.path, k + 1, len(frames)))
            extremes.add(opened[1], opened[2])
        _, dataset, stored = opened
        try:
            pixels = split_tiles(stored[0], frame.tiles) if frame.tiles else stored
            stack[k], padding = _to_values(dataset, pixels[frame.index], frame.index)
        except Exception:  # noqa: BLE001 - an invalid rescale or look-up table can raise anything
            raise _damaged(k + 1, len(frames)) from None
        if padding is not None:
            stack[k][padding] = np.nan
            padded += int(padding.sum())
        inverted |= _is_inverted(dataset)
        unscaled += _is_unscaled_ct(dataset, frame.index)
        assumed |= dataset.get("PhotometricInterpretation") is None
    extremes.check()
    if padded:
        _fill_padding(stack)
    if unscaled:
        _refuse_other_than_hounsfield(stack, unscaled)
    notes = _notes(padded=padded, inverted=inverted, unscaled=bool(unscaled), assumed=assumed)
    return stack.transpose(2, 1, 0), tuple(notes)


def hash_values(path: Path) -> bytes | None:
    """Return a hash of the values of a file, which no lossless encoding changes. Return None for damaged pixels."""
    digest = hashlib.sha256()
    try:
        dataset, stored = _decode_file(path, 1, 1)
        for index, frame in enumerate(stored):
            values, _ = _to_values(dataset, frame, index)
            digest.update(values.tobytes())
    except Exception:  # noqa: BLE001 - as in `read_frames`
        return None
    return digest.digest()


def _decode_file(path: Path, number: int, count: int) -> tuple[pydicom.Dataset, StoredPixels]:
    """Return the data set of a file and its stored pixels, (F, rows, columns)."""
    try:
        dataset = pydicom.dcmread(path, force=True)
        _check_decodable(dataset, number, count)
        _check_announced_sizes(dataset)
        stored = np.asarray(_complete_for_decoding(dataset).pixel_array)
    except CounterpartError:
        raise
    except Exception:  # noqa: BLE001 - each decoder raises exceptions of its own
        raise _damaged(number, count) from None
    return dataset, stored if stored.ndim == 3 else stored[np.newaxis]


def _complete_for_decoding(dataset: pydicom.FileDataset) -> pydicom.FileDataset:
    """Return the data set, or a copy with attributes that pydicom needs and that can have only one value."""
    defaults = {"PhotometricInterpretation": "MONOCHROME2", "SamplesPerPixel": 1}
    missing = {name: value for name, value in defaults.items() if name not in dataset}
    if missing:
        dataset = copy.copy(dataset)
        for name, value in missing.items():
            setattr(dataset, name, value)
    return dataset


def _set_transfer_syntax(dataset: pydicom.FileDataset) -> None:
    """Set the transfer syntax with which a file without file meta information was parsed.

    Raises
    ------
    UnsupportedPixels
        If its pixel data is compressed: only the file meta information states how.
    """
    if getattr(dataset.file_meta, "TransferSyntaxUID", None):
        return
    if dataset["PixelData"].is_undefined_length:
        raise UnsupportedPixels(
            "The file has no file meta information, and its pixel data is compressed.",
            expected="the attribute TransferSyntaxUID (0002,0010).",
            advice="Export the series again as DICOM files (PS3.10), or without compression.",
        )
    implicit, little = dataset.original_encoding
    explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _check_decodable(dataset: pydicom.FileDataset, number: int, count: int) -> None:
    if "PixelData" not in dataset:
        raise NoImageInArchive(
            f"Slice {number} of {count} has the header of an image but no pixel data.",
            expected="pixel data in every slice.",
            advice="Export the series again, including its images.",
        )
    _set_transfer_syntax(dataset)
    syntax = UID(getattr(dataset.file_meta, "TransferSyntaxUID", ""))
    try:
        available = get_decoder(syntax).is_available if syntax else True
    except NotImplementedError:
        available = False
    if not available:
        name = "a private transfer syntax" if syntax.is_private else syntax.name
        raise UnsupportedPixels(
            f"The pixel data is compressed as {name}. There is no decoder for it.",
            expected="uncompressed, RLE, JPEG, JPEG-LS, JPEG 2000 or HTJ2K pixel data.",
            advice="Export the series without compression. `counterpart doctor` lists the decoders.",
        )


def _check_announced_sizes(dataset: pydicom.FileDataset) -> None:
    """Check that compressed frames are not larger than the header states, before a decoder allocates their size.

    Raises
    ------
    ValueError
        If a frame is larger.
    """
    syntax = UID(getattr(dataset.file_meta, "TransferSyntaxUID", ""))
    if not syntax or not syntax.is_encapsulated:
        return
    for frame in generate_frames(dataset.PixelData, number_of_frames=int(dataset.get("NumberOfFrames") or 1)):
        rows, columns = announced_size(frame) or (0, 0)
        if rows > dataset.Rows or columns > dataset.Columns:
            raise ValueError("a compressed frame is larger than the header states")


def _to_values(dataset: pydicom.Dataset, stored: StoredPixels, index: int) -> tuple[FloatArray, BoolArray | None]:
    """Return one frame in the scan's units, and a mask of its padding if the file states a padding value."""
    padding = _padding_mask(dataset, stored)
    if _is_inverted(dataset):
        # Invert over the whole stored range (PS3.3 C.7.6.3.1.2), so that every slice is inverted equally.
        bits, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation)
        stored = (-1 if signed else 2**bits - 1) - stored.astype(np.int64)
    transform = functional_group(dataset, index, "PixelValueTransformationSequence")
    return np.asarray(apply_modality_lut(stored, transform), dtype=np.float32), padding


def _is_inverted(dataset: pydicom.Dataset) -> bool:
    # Hounsfield units are physical: the way they are displayed does not change them.
    return bool(dataset.get("PhotometricInterpretation") == "MONOCHROME1" and dataset.get("Modality") != "CT")


def _is_unscaled_ct(dataset: pydicom.Dataset, index: int) -> bool:
    """Return True for a CT frame without a conversion to Hounsfield units."""
    transform = functional_group(dataset, index, "PixelValueTransformationSequence")
    is_scaled = ("RescaleSlope" in transform and "RescaleIntercept" in transform) or "ModalityLUTSequence" in transform
    return dataset.get("Modality") == "CT" and not is_scaled


def _refuse_other_than_hounsfield(stack: FloatArray, unscaled: int) -> None:
    """Raise an error if a CT without rescale cannot be in Hounsfield units.

    Raises
    ------
    InvalidHeader
        If only some slices are without, or no voxel is as low as air.
    """
    if unscaled < len(stack) or stack.min() > MAX_AIR_HU:
        raise InvalidHeader(
            f"{unscaled} of {len(stack)} CT slices have no RescaleSlope and RescaleIntercept, and their values are not "
            "Hounsfield units.",
            expected="the rescale to Hounsfield units in every slice (PS3.3 C.8.2.1).",
            advice="Export the series again from the original.",
        )


def _padding_mask(dataset: pydicom.Dataset, stored: StoredPixels) -> BoolArray | None:
    """Return a mask of the pixels outside the image (PS3.3 C.7.5.1.1.2), or None if no padding value is stated."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    # A signed value is often written as an unsigned one: its bits are compared.
    ends = np.array([value, value if limit is None else limit], dtype=np.int64).astype(stored.dtype)
    inside: BoolArray = (stored >= ends.min()) & (stored <= ends.max())
    return inside


def _fill_padding(stack: FloatArray) -> None:
    """Set padding (NaN) to the smallest value of the image, because padding is background."""
    holes = np.isnan(stack)
    background = np.float32(0) if holes.all() else np.nanmin(stack)
    stack[holes] = background


def _notes(*, padded: int, inverted: bool, unscaled: bool, assumed: bool) -> Iterator[str]:
    if padded:
        yield f"{padded} padding pixels were set to the smallest value of the image."
    if inverted:
        yield "The grey scale was stored inverted (MONOCHROME1) and was inverted back."
    if unscaled:
        yield "The CT states no rescale. Its values are low enough for air, so they were read as Hounsfield units."
    if assumed:
        yield "The images state no PhotometricInterpretation. MONOCHROME2 was assumed."


def _damaged(number: int, count: int) -> TruncatedFile:
    return TruncatedFile(
        f"The pixel data of slice {number} of {count} is incomplete or damaged.",
        expected="pixel data of the size and encoding that the header states.",
        advice="Export the series again, and check that every file arrived complete.",
    )


# ---- decoder plugin for 12-bit JPEG ------------------------------------------------------------
#
# GDCM decodes JPEG Extended with 12 bits, but pydicom's own plugin for GDCM declines it. pydicom uses this plugin
# after its own ones. Its output equals dcmtk's in every pixel, on the real files of the tests. pydicom's plugin
# protocol prescribes the names `DECODER_DEPENDENCIES` and `is_available`.

DECODER_DEPENDENCIES = {JPEGExtended12Bit: ("gdcm>=3.0",)}
_PLUGIN_LABEL = "gdcm, 12 bits"


def is_available(uid: str) -> bool:
    """Return True if the plugin decodes a transfer syntax."""
    return uid in DECODER_DEPENDENCIES


def decode_jpeg12_frame(src: bytes, runner: DecodeRunner) -> bytes:
    """Decode one grey frame into little-endian 16-bit pixels.

    Raises
    ------
    NotImplementedError
        If the frame is in colour or does not have 9 to 12 bits.
    ValueError
        If GDCM decodes no frame of the size that the header states.
    """
    if runner.samples_per_pixel != 1 or runner.bits_allocated != 16 or not 8 < runner.bits_stored <= 12:
        raise NotImplementedError("only grey frames of 9 to 12 bits")
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(src)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((runner.columns, runner.rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    bits, signed = runner.bits_stored, runner.pixel_representation
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, bits, bits - 1, signed))
    # GDCM's Python binding returns the bytes as text.
    frame: bytes = image.GetBuffer().encode("utf-8", "surrogateescape")
    if len(frame) != 2 * runner.rows * runner.columns:
        raise ValueError("the decoded frame does not have the expected size")
    return frame


def _choose_decoders() -> None:
    if _PLUGIN_LABEL not in JPEGExtended12BitDecoder.available_plugins:
        JPEGExtended12BitDecoder.add_plugin(_PLUGIN_LABEL, (__name__, "decode_jpeg12_frame"))
    # GDCM never frees the compressed frame of a truncated JPEG-LS stream: CharLS alone decodes those.
    for decoder in (JPEGLSLosslessDecoder, JPEGLSNearLosslessDecoder):
        if "gdcm" in decoder.available_plugins:
            decoder.remove_plugin("gdcm")


_choose_decoders()
