"""Stored pixels -> values in the scan's own units (Hounsfield units for CT)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.pixels.decoders.base import JPEGLSLosslessDecoder, JPEGLSNearLosslessDecoder, get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.uid import UID

from app.errors import CounterpartError, NoImageInArchive, TruncatedFile, UnsupportedPixels
from app.ingest import jpeg12
from app.ingest.attributes import functional_group
from app.ingest.mosaic import split
from app.volume import FloatArray

jpeg12.register()
# GDCM never frees the compressed frame of a JPEG-LS stream that breaks off: CharLS alone decodes those.
for _decoder in (JPEGLSLosslessDecoder, JPEGLSNearLosslessDecoder):
    if "gdcm" in _decoder.available_plugins:
        _decoder.remove_plugin("gdcm")

StoredPixels = npt.NDArray[np.generic]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Frame:
    """One frame of a file, or one tile of a mosaic, counted from 0."""

    path: Path
    index: int
    tiles: int = 0


def read_frames(frames: Sequence[Frame], rows: int, columns: int) -> tuple[FloatArray, tuple[str, ...]]:
    """Decode frames into one array.

    Parameters
    ----------
    frames : sequence of Frame
        In the order of the volume's last axis.
    rows, columns : int
        Shape of each.

    Returns
    -------
    values : (columns, rows, N) ndarray of float32
        Modality rescale or look-up table applied; an inverted MR (MONOCHROME1) turned bright side
        up; pixel padding set to the smallest other value.
    notes : tuple of str
        What was changed.

    Raises
    ------
    UnsupportedPixels, NoImageInArchive, TruncatedFile
        No decoder for the compression; no pixel data; pixel data that is incomplete or damaged.
    """
    stack = np.empty((len(frames), rows, columns), dtype=np.float32)
    padded, inverted = 0, False
    opened: tuple[Path, pydicom.Dataset, StoredPixels] | None = None
    for k, frame in enumerate(frames):
        if opened is None or opened[0] != frame.path:  # frames of one file are neighbours, mostly
            opened = (frame.path, *_open(frame.path, k + 1, len(frames)))
        _, dataset, stored = opened
        try:
            tiles = split(stored[0], frame.tiles) if frame.tiles else stored
            stack[k], padding = _values(dataset, tiles[frame.index], frame.index)
        except Exception:  # noqa: BLE001 - a broken rescale or look-up table raises anything
            raise _damaged(k + 1, len(frames)) from None
        if padding is not None:
            stack[k][padding] = np.nan
            padded += int(padding.sum())
        inverted |= _is_inverted(dataset)
    if padded:
        _fill_padding(stack)
    return stack.transpose(2, 1, 0), tuple(_notes(padded=padded, inverted=inverted))


def _open(path: Path, number: int, count: int) -> tuple[pydicom.Dataset, StoredPixels]:
    """A file and its stored pixels, (F, rows, columns)."""
    try:
        dataset = pydicom.dcmread(path, force=True)
        _check_decodable(dataset, number, count)
        stored = np.asarray(dataset.pixel_array)
    except CounterpartError:
        raise
    except Exception:  # noqa: BLE001 - each decoder raises its own kinds
        raise _damaged(number, count) from None
    return dataset, stored if stored.ndim == 3 else stored[np.newaxis]


def _check_decodable(dataset: pydicom.FileDataset, number: int, count: int) -> None:
    if "PixelData" not in dataset:
        raise NoImageInArchive(
            f"Slice {number} of {count} has an image's header and no pixel data.",
            expected="pixel data in every slice.",
            advice="Export the series again, with its images.",
        )
    syntax = UID(getattr(dataset.file_meta, "TransferSyntaxUID", ""))
    try:
        available = get_decoder(syntax).is_available if syntax else True
    except NotImplementedError:
        available = False
    if not available:
        name = "a private transfer syntax" if syntax.is_private else syntax.name
        raise UnsupportedPixels(
            f"The pixels are compressed as {name}, which cannot be decoded here.",
            expected="uncompressed, RLE, JPEG, JPEG-LS, JPEG 2000 or HTJ2K pixel data.",
            advice="Export the series uncompressed; `counterpart doctor` lists the decoders.",
        )


def _values(dataset: pydicom.Dataset, stored: StoredPixels, index: int) -> tuple[FloatArray, BoolArray | None]:
    """One frame in its own units, and where it is padding, if its file names any."""
    padding = _padding(dataset, stored)
    if _is_inverted(dataset):
        # The stored range turned over (PS3.3 C.7.6.3.1.2), the same for every slice.
        bits, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation)
        stored = (-1 if signed else 2**bits - 1) - stored.astype(np.int64)
    transform = functional_group(dataset, index, "PixelValueTransformationSequence")
    return np.asarray(apply_modality_lut(stored, transform), dtype=np.float32), padding


def _is_inverted(dataset: pydicom.Dataset) -> bool:
    # Hounsfield units are physical: how they are to be displayed does not change them.
    return bool(dataset.get("PhotometricInterpretation") == "MONOCHROME1" and dataset.get("Modality") != "CT")


def _padding(dataset: pydicom.Dataset, stored: StoredPixels) -> BoolArray | None:
    """Pixels outside the image (PS3.3 C.7.5.1.1.2); None where no number marks them."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    # A signed value is often written with the unsigned representation: the bits count.
    ends = np.array([value, value if limit is None else limit], dtype=np.int64).astype(stored.dtype)
    inside: BoolArray = (stored >= ends.min()) & (stored <= ends.max())
    return inside


def _fill_padding(stack: FloatArray) -> None:
    """Give padding the smallest value of the image: it is background, whatever number marks it."""
    holes = np.isnan(stack)
    background = np.float32(0) if holes.all() else np.nanmin(stack)
    stack[holes] = background


def _notes(*, padded: int, inverted: bool) -> Iterator[str]:
    if padded:
        yield f"{padded} padding pixels were set to the smallest value of the image."
    if inverted:
        yield "The grey scale was stored inverted (MONOCHROME1) and was turned over."


def _damaged(number: int, count: int) -> TruncatedFile:
    return TruncatedFile(
        f"The pixel data of slice {number} of {count} is incomplete or damaged.",
        expected="pixel data of the size and encoding that the header states.",
        advice="Export the series again, and check that every file arrived whole.",
    )
