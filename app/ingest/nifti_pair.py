"""Pairs of a header (.hdr) and an image (.img): NIfTI and Analyze 7.5. A pair is joined into one NIfTI file."""

import tempfile
from pathlib import Path
from typing import BinaryIO, cast

import nibabel as nib
import numpy as np
from isal import igzip

from app.ingest import nifti
from app.ingest.limits import CHUNK_BYTES, Limits
from app.ingest.volume_file import (
    GZIP_SIGNATURE,
    HEADER_ERRORS,
    InflateError,
    invalid_header,
    read_inflated_head,
    truncated,
)

# Lower case, each also with .gz behind it.
HEADER_SUFFIX, IMAGE_SUFFIX = ".hdr", ".img"
_NIFTI1_SINGLE, _NIFTI1_VOXELS = b"n+1\0", 352
_NIFTI2_SINGLE, _NIFTI2_VOXELS = b"n+2\0\r\n\x1a\n", 544
_INCOMPLETE = "The image file of the pair ends before its last voxel."


def split_name(name: str) -> tuple[str, str]:
    """Split a file name into the part that both files of a pair share, and the suffix without .gz, in lower case."""
    plain = name[:-3] if name.lower().endswith(".gz") else name
    stem, dot, suffix = plain.rpartition(".")
    return stem, (dot + suffix).lower()


def find_image(path: Path) -> Path | None:
    """Return the image file beside a file if that is the header of a pair, else None."""
    return _find_beside(path, IMAGE_SUFFIX) if _is_header(path) else None


def find_header(path: Path) -> Path | None:
    """Return the header beside a file that is the image of a pair, else None."""
    if split_name(path.name)[1] != IMAGE_SUFFIX:
        return None
    header = _find_beside(path, HEADER_SUFFIX)
    return header if header and _is_header(header) else None


def join_pair(header: Path, image: Path, scratch: Path, limits: Limits) -> Path:
    """Write one NIfTI file with the header and the voxels of a pair.

    Parameters
    ----------
    header, image : Path
        Files of the pair, plain or gzipped.
    scratch : Path
        Folder for the new file. It is created if it is missing.
    limits : Limits

    Raises
    ------
    TruncatedFile
        If the image ends before its last voxel.
    TooManyVoxels
        If the header states a size beyond `limits`. It is checked before anything is written.
    InvalidHeader, NotAVolume, UnsupportedPixels
        If the header is not that of one grey volume.
    """
    try:
        head, offset = _single_file_head(read_inflated_head(header))
    except HEADER_ERRORS:
        raise invalid_header() from None
    remaining = nifti.count_bytes(head, limits) - len(head)
    if offset > limits.max_inflated_bytes:
        raise truncated(_INCOMPLETE)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=scratch, prefix="pair-", delete=False) as joined:
        joined.write(head)
        try:
            with _open(image) as source:
                source.seek(offset)
                while remaining > 0 and (chunk := source.read(min(remaining, CHUNK_BYTES))):
                    joined.write(chunk)
                    remaining -= len(chunk)
        except (igzip.BadGzipFile, EOFError, InflateError):
            raise truncated("The gzip stream is incomplete or damaged.") from None
    if remaining:
        raise truncated(_INCOMPLETE)
    return Path(joined.name)


def _single_file_head(head: bytes) -> tuple[bytes, int]:
    """Return the header of a single file with the same voxels, and where they begin in the image file."""
    if nifti.is_nifti2(head):
        second = nib.Nifti2Header(head[: nib.Nifti2Header.template_dtype.itemsize], check=False)
        offset = int(second["vox_offset"])
        second["magic"], second["vox_offset"] = _NIFTI2_SINGLE, _NIFTI2_VOXELS
        return second.binaryblock + bytes(4), max(0, offset)
    size = nib.Nifti1Header.template_dtype.itemsize
    if nifti.is_analyze(head):
        first, offset = _from_analyze(nib.AnalyzeHeader(head[:size], check=True))
    else:
        first = nib.Nifti1Header(head[:size], check=False)
        offset = int(first["vox_offset"])
    first["magic"], first["vox_offset"] = _NIFTI1_SINGLE, _NIFTI1_VOXELS
    return first.binaryblock + bytes(4), max(0, offset)


def _from_analyze(analyze: nib.AnalyzeHeader) -> tuple[nib.Nifti1Header, int]:
    """Return the NIfTI header for an Analyze header, and where its voxels begin. Analyze states no position."""
    header = nib.Nifti1Header(endianness=analyze.endianness)
    header.set_data_dtype(analyze.get_data_dtype())
    header["dim"], header["pixdim"][1:] = analyze["dim"], np.abs(analyze["pixdim"][1:])
    # SPM stores the slope of the values in this field, which Analyze does not use.
    slope = float(analyze["funused1"])
    header["scl_slope"] = slope if np.isfinite(slope) and slope > 0 else 0
    return header, int(analyze["vox_offset"])


def _is_header(path: Path) -> bool:
    return split_name(path.name)[1] == HEADER_SUFFIX and nifti.is_pair_header(read_inflated_head(path))


def _find_beside(path: Path, suffix: str) -> Path | None:
    stem = split_name(path.name)[0]
    # Names are tried, not listed, because an upload can hold thousands of pairs.
    names = (f"{stem}{cased}{packed}" for cased in (suffix, suffix.upper()) for packed in ("", ".gz", ".GZ"))
    return next((beside for name in names if (beside := path.with_name(name)).is_file()), None)


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        is_gzipped = file.read(len(GZIP_SIGNATURE)) == GZIP_SIGNATURE
    return cast("BinaryIO", igzip.open(path)) if is_gzipped else path.open("rb")
