"""One file that is one volume (NIfTI, MGH), plain or gzipped -> a scan."""

import tempfile
from pathlib import Path
from typing import BinaryIO, Protocol

from isal import igzip

from app.errors import CounterpartError, NotAnImageFormat
from app.ingest import mgh, nifti
from app.ingest.announced import truncated
from app.ingest.archive import CHUNK_BYTES, InflateError
from app.ingest.limits import Limits
from app.ingest.quiet import quiet
from app.ingest.sniff import ACCEPTED, HEAD_BYTES, Format, sniff
from app.volume import Scan


class SingleFile(Protocol):
    """A module that reads one format."""

    def announced_bytes(self, head: bytes, limits: Limits) -> int:
        """Bytes from the file's start to its last voxel, as the header says."""

    def load(self, file: BinaryIO, limits: Limits) -> Scan:
        """The scan."""


_FORMATS: dict[Format | None, SingleFile] = {"nifti": nifti, "mgh": mgh}


def read(path: Path, scratch: Path, limits: Limits) -> Scan:
    """Read a NIfTI or MGH file, whatever its name.

    Parameters
    ----------
    path : Path
        A file that `sniff` calls "nifti", "mgh" or "gzip".
    scratch : Path
        Where a gzipped file is inflated.

    Raises
    ------
    NotAnImageFormat
        Something else inside gzip.
    TruncatedFile
        Fewer voxels than the header announces, or a damaged stream.
    TooManyVoxels
        The header announces more than is accepted.
    NotAVolume, UnsupportedPixels, InvalidVoxels, ConstantVoxels, InvalidGeometry
        The image is not one grey volume with a place in space.
    """
    with quiet():
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            kind = sniff(head)
            if kind != "gzip":
                return _format(kind).load(file, limits)
        with _inflated(path, scratch, limits) as file:
            kind = sniff(file.read(HEAD_BYTES))
            return _format(kind).load(file, limits)


def is_gzipped_volume(path: Path) -> bool:
    """Whether a NIfTI or MGH header is inside a gzipped file."""
    try:
        with igzip.open(path) as stream:
            return sniff(stream.read(HEAD_BYTES)) in _FORMATS
    except (CounterpartError, OSError, EOFError, InflateError):
        return False


def _inflated(path: Path, scratch: Path, limits: Limits) -> BinaryIO:
    """The inside of a gzipped file, as long as its header announces and no longer."""
    scratch.mkdir(parents=True, exist_ok=True)
    out = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - closed by the caller
    try:
        with igzip.open(path) as stream:
            head = stream.read(HEAD_BYTES)
            left = _inside(head).announced_bytes(head, limits) - len(head)
            out.write(head)
            while left > 0 and (chunk := stream.read(min(left, CHUNK_BYTES))):
                out.write(chunk)
                left -= len(chunk)
            stream.read(1)  # the end of the stream, where its checksum is compared
    except (OSError, EOFError, InflateError) as failure:
        out.close()
        if isinstance(failure, OSError) and not isinstance(failure, igzip.BadGzipFile):
            raise  # the disk's fault, not the file's
        raise truncated("The gzip stream ends early or is damaged.") from None
    except CounterpartError:
        out.close()
        raise
    out.seek(0)
    return out


def _inside(head: bytes) -> SingleFile:
    """What a gzipped file holds."""
    try:
        kind = sniff(head) if head else None
    except NotAnImageFormat:
        kind = None
    if kind in _FORMATS:
        return _FORMATS[kind]
    raise NotAnImageFormat(
        "The gzipped file holds no NIfTI or MGH image.",
        expected=ACCEPTED,
        advice="Check what was compressed; send DICOM as a zip.",
    )


def _format(kind: Format) -> SingleFile:
    assert kind in _FORMATS, "the caller has looked"
    return _FORMATS[kind]
