"""A zip -> numbered files in the caller's scratch folder. Names in it are never used."""

import errno
import stat
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, NoReturn

from isal import isal_zlib

from app.errors import NotAnImageFormat, TruncatedFile, UnreadableScan, UnsafeArchive
from app.ingest.limits import Limits
from app.ingest.sniff import HEAD_BYTES, sniff

CHUNK_BYTES = 1 << 20
# Its stub calls the class an exception.
InflateError: type[Exception] = isal_zlib.error  # type: ignore[assignment]
# bzip2 and LZMA inflate without a bound in Python's zipfile: one chunk can become gigabytes.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
# The record that ends a zip (APPNOTE 4.3.16), which a comment of up to 64 KiB may follow.
_END, _END_BYTES, _COMMENT_BYTES = b"PK\x05\x06", 22, 0xFFFF
# One entry of the directory is 46 bytes and a name: more on average is no archive of images.
_ENTRY_BYTES = 1024

_EXPECTED = "a plain zip (stored or deflated, no password) of one DICOM series or one NIfTI or MGH file."


def unpack(path: Path, scratch: Path, limits: Limits) -> list[Path]:
    """Inflate the files of a zip that can be images.

    Parameters
    ----------
    path : Path
        The archive.
    scratch : Path
        Where a new folder is made for the files, numbered in the archive's order.
    limits : Limits
        Bounds on files and on inflated bytes, counted while they are inflated.

    Returns
    -------
    list of Path
        NIfTI (plain or gzipped) and DICOM files. Folders, links, archives inside the archive and
        files of other formats are left out.

    Raises
    ------
    UnsafeArchive
        A password, too many files, too many bytes, or an unusual compression.
    TruncatedFile
        The archive is damaged.
    """
    try:
        with path.open("rb") as file:
            _check_directory(file, limits)
            with zipfile.ZipFile(file) as archive:
                return _inflate(archive, scratch, limits)
    except UnreadableScan:
        raise
    except OSError as failure:
        if failure.errno != errno.EINVAL:
            raise  # the disk's fault, not the archive's
        # An entry that would begin before the archive's first byte.
        raise _damaged() from None
    except (zipfile.BadZipFile, zlib.error, InflateError, struct.error, EOFError, ValueError, NotImplementedError):
        # The library's text can hold names, which can hold a patient's.
        raise _damaged() from None


def _damaged() -> TruncatedFile:
    return TruncatedFile(
        "The zip archive is damaged or incomplete.",
        expected=_EXPECTED,
        advice="Zip the series again, and check that the whole archive arrived.",
    )


def _check_directory(file: IO[bytes], limits: Limits) -> None:
    """Refuse a list of files that is too long to be even read."""
    length = file.seek(0, 2)
    file.seek(max(0, length - _END_BYTES - _COMMENT_BYTES))
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0:
        raise zipfile.BadZipFile
    count, size = struct.unpack("<HL", tail[at + 10 : at + 16])
    if count > limits.max_files or size > limits.max_files * _ENTRY_BYTES:
        _refuse(f"The archive holds more than {limits.max_files} files.")
    file.seek(0)


def _inflate(archive: zipfile.ZipFile, scratch: Path, limits: Limits) -> list[Path]:
    entries = [entry for entry in archive.infolist() if not entry.is_dir() and not _is_link(entry)]
    if len(entries) > limits.max_files:
        _refuse(f"The archive holds {len(entries)} files, and at most {limits.max_files} are accepted.")
    if any(entry.flag_bits & _ENCRYPTED for entry in entries):
        _refuse("The archive is protected by a password.")
    if any(entry.compress_type not in _METHODS for entry in entries):
        _refuse("The archive is compressed by a method other than deflate.")
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="unpacked-", dir=scratch))
    left, files = limits.max_inflated_bytes, []
    for number, entry in enumerate(entries):
        with archive.open(entry) as source:
            _inflate_fast(source, entry)
            head = source.read(HEAD_BYTES)
            if not _may_hold_image(head):
                continue
            target = folder / f"{number:06d}"
            left -= _copy(head, source, target, left, limits)
        files.append(target)
    return files


def _inflate_fast(source: IO[bytes], entry: zipfile.ZipInfo) -> None:
    """Let igzip inflate an entry: twice as fast as zlib, of which a series of slices has half a second."""
    if entry.compress_type == zipfile.ZIP_DEFLATED:
        # Private to zipfile, which lets no one choose; where it is called otherwise, zlib goes on.
        source._decompressor = isal_zlib.decompressobj(-isal_zlib.MAX_WBITS)  # type: ignore[attr-defined]


def _copy(head: bytes, source: IO[bytes], target: Path, left: int, limits: Limits) -> int:
    """Write one file; the bytes written, at most `left`."""
    written, chunk = 0, head
    with target.open("xb") as out:
        while chunk:
            written += len(chunk)
            if written > left:
                _refuse(f"The archive inflates to more than {limits.max_inflated_bytes / 1e6:.0f} MB.")
            out.write(chunk)
            chunk = source.read(CHUNK_BYTES)
    return written


def _may_hold_image(head: bytes) -> bool:
    """Whether a file is worth inflating; an archive in an archive is not."""
    if not head:
        return False
    try:
        return sniff(head) != "zip"
    except NotAnImageFormat:
        return False


def _is_link(entry: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(entry.external_attr >> 16)


def _refuse(found: str) -> NoReturn:
    raise UnsafeArchive(found, expected=_EXPECTED, advice="Send one series in one plain zip.")
