"""Deflated data sets: checks of their size, and their first elements. pydicom inflates a whole file in memory."""

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_preamble
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from app.errors import UnsafeArchive
from app.ingest.limits import CHUNK_BYTES, Limits

# Images are deflated to a tenth or, if they are mostly background, to a hundredth. Small files may be empty.
MAX_INFLATION, MIN_BOMB_BYTES = 100, 1 << 26
META_GROUP = 0x0002

_read_explicit: Callable[..., Dataset] = partial(read_dataset, is_implicit_VR=False, is_little_endian=True)


def check_deflated(path: Path, max_inflated_bytes: int, limits: Limits) -> int:
    """Check the size of a deflated data set before pydicom inflates it in one piece.

    Returns
    -------
    int
        Bytes after inflating, or 0 if the file is not deflated.

    Raises
    ------
    UnsafeArchive
        If it inflates to more than `max_inflated_bytes`, or to more than `MAX_INFLATION` times its size.
    """
    with path.open("rb") as file:
        read_preamble(file, force=True)
        meta = _read_explicit(file, stop_when=_is_after_meta)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return 0
        most = min(max_inflated_bytes, max(MIN_BOMB_BYTES, MAX_INFLATION * path.stat().st_size))
        inflater, count = zlib.decompressobj(-zlib.MAX_WBITS), 0
        # At the end of the stream, `unconsumed_tail` may keep the padding byte of the file.
        while not inflater.eof and (chunk := inflater.unconsumed_tail or file.read(CHUNK_BYTES)):
            count += len(inflater.decompress(chunk, CHUNK_BYTES))
            if count > most:
                found = f"The deflated DICOM files inflate to more than {limits.max_inflated_bytes / 1e6:.0f} MB."
                if most < max_inflated_bytes:
                    found = f"A deflated DICOM file inflates to more than {MAX_INFLATION} times its size."
                raise UnsafeArchive(
                    found,
                    expected="a DICOM series.",
                    advice="Export the series without compression.",
                )
        return count


def read_first_elements(path: Path, tags: Sequence[BaseTag], limit: int) -> Dataset:
    """Return some elements of a deflated file, of which only the first `limit` bytes are inflated.

    Parameters
    ----------
    path : Path
    tags : sequence of BaseTag
        The last one is the highest. What comes after it is not read.
    limit : int
        Bytes.
    """
    with path.open("rb") as file:
        read_preamble(file, force=False)
        _read_explicit(file, stop_when=_is_after_meta)
        start = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(limit), limit)
    return _read_explicit(BytesIO(start), stop_when=lambda tag, *_: tag > tags[-1], specific_tags=list(tags))


def _is_after_meta(tag: BaseTag, _vr: str | None, _length: int) -> bool:
    return tag.group != META_GROUP
