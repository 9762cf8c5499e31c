"""Read a scan of any supported format.

A format is one entry of `READERS`. Everything here iterates over them: format detection, reading of a file, an
archive or a folder, and the list of formats in error messages.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.errors import CounterpartError, EmptyUpload, NoImageInArchive, NotAnImageFormat, SeveralSeries, UnsafeArchive
from app.ingest import archive, mgh, nifti
from app.ingest.limits import DEFAULT_LIMITS, HEAD_BYTES, Limits
from app.ingest.outliers import repair_outliers
from app.ingest.volume_file import GZIP_SIGNATURE, VolumeFormat, read_gzipped_head, read_volume_file
from app.volume import Geometry, Scan

__all__ = [
    "ACCEPTED_FORMATS",
    "DEFAULT_LIMITS",
    "HEAD_BYTES",
    "READERS",
    "Limits",
    "ReadOptions",
    "Reader",
    "detect_format",
    "read_scan",
]

# Local file header, end of an empty archive, marker of a split archive.
_ZIP_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
_DICOM_PREFIX, _DICOM_PREFIX_OFFSET = b"DICM", 128
# A data set without the preamble begins with an element of group 0002 or 0008, little endian.
_DICOM_FIRST_GROUPS = (0x0002, 0x0008)
_DICOM_MAX_FIRST_ELEMENT = 0x0020


@dataclass(frozen=True)
class ReadOptions:
    """Options of `read_scan`, passed on to the reader of the format."""

    scratch: Path
    series: str | None = None
    geometry: Geometry = "refuse"
    limits: Limits = DEFAULT_LIMITS


@dataclass(frozen=True)
class Reader:
    """Reader for one image format.

    Attributes
    ----------
    format : str
        Name of the format, as in `app.volume.Source.format`.
    title : str
        Name of the format for users.
    suffixes : str
        Usual file name endings, for users. They have no influence on reading.
    matches : callable
        Return True if the first `HEAD_BYTES` bytes of a file, or all bytes of a shorter file, are those of this
        format. It may raise `NotAnImageFormat` to explain why a related format is not read.
    read : callable
        Read files of this format into one scan.
    one_file : bool
        True if a file contains a whole scan, False if a scan can consist of several files.
    may_be_gzipped : bool
        True if `read` also reads gzipped files of this format.
    """

    format: str
    title: str
    suffixes: str
    matches: Callable[[bytes], bool]
    read: Callable[[Sequence[Path], ReadOptions], Scan]
    one_file: bool
    may_be_gzipped: bool


def _volume_reader(name: str, title: str, suffixes: str, volume_format: VolumeFormat) -> Reader:
    """Return the reader for a format of which a file is a whole volume."""

    def read(files: Sequence[Path], options: ReadOptions) -> Scan:
        (path,) = files
        return read_volume_file(path, volume_format, options.scratch, options.limits)

    return Reader(name, title, suffixes, volume_format.matches, read, one_file=True, may_be_gzipped=True)


def _is_dicom(head: bytes) -> bool:
    if head[_DICOM_PREFIX_OFFSET:].startswith(_DICOM_PREFIX):
        return True
    if len(head) < 8:
        return False
    group, element = struct.unpack("<HH", head[:4])
    return group in _DICOM_FIRST_GROUPS and element < _DICOM_MAX_FIRST_ELEMENT


def _read_dicom(files: Sequence[Path], options: ReadOptions) -> Scan:
    # These imports take two seconds, and a NIfTI file does not need them.
    from app.ingest.dicom.reader import read_dicom  # noqa: PLC0415

    return read_dicom(files, options.series, options.geometry, options.limits)


READERS: tuple[Reader, ...] = (
    _volume_reader("nifti", "NIfTI", ".nii, .nii.gz", nifti),
    _volume_reader("mgh", "FreeSurfer MGH", ".mgh, .mgz", mgh),
    Reader("dicom", "DICOM", "any name", _is_dicom, _read_dicom, one_file=False, may_be_gzipped=False),
)
_FORMAT_LIST = ", ".join(f"a {reader.title} file ({reader.suffixes})" for reader in READERS)
ACCEPTED_FORMATS = f"{_FORMAT_LIST}, or a zip of one scan in one of these formats."


def read_scan(
    path: Path,
    *,
    scratch: Path,
    series: str | None = None,
    geometry: Geometry = "refuse",
    limits: Limits = DEFAULT_LIMITS,
) -> Scan:
    """Read one scan. The format is detected from the content; file names do not matter.

    Parameters
    ----------
    path : Path
        A file of a supported format (NIfTI and MGH may be gzipped), a zip of such a file or of a DICOM series,
        or a folder of them.
    scratch : Path
        Folder for extracted files. It is created if it is missing, and must exist as long as the files in
        `Scan.source.instances` are needed.
    series : str, optional
        SeriesInstanceUID of the series to read if there are several. "<UID>/2" is the second stack of a series.
    geometry : {"refuse", "resample"}, optional
        Refuse or resample DICOM slices that are missing, tilted or unevenly spaced.
    limits : Limits, optional
        Limits on the size of the upload.

    Raises
    ------
    CounterpartError
        A subclass of `UploadError` or `UnreadableScan`, or `WrongModality`, for every fault of the upload.
    """
    options = ReadOptions(scratch, series, geometry, limits)
    scan = _read_folder(path, options) if path.is_dir() else _read_file(path, options)
    return repair_outliers(scan)


def detect_format(head: bytes) -> str:
    """Return the format of a file: "gzip", "zip", or the format of one of `READERS`.

    Parameters
    ----------
    head : bytes
        The first `HEAD_BYTES` bytes of the file, or all bytes of a shorter file.

    Raises
    ------
    EmptyUpload
        If `head` is empty.
    NotAnImageFormat
        If no reader recognises the file.
    """
    if not head:
        raise EmptyUpload("The file is empty.", expected=ACCEPTED_FORMATS, advice="Export the scan and send it again.")
    if head.startswith(GZIP_SIGNATURE):
        return "gzip"
    if head.startswith(_ZIP_SIGNATURES):
        return "zip"
    for reader in READERS:
        if reader.matches(head):
            return reader.format
    raise NotAnImageFormat(
        "The file is not in an image format that Counterpart reads.",
        expected=ACCEPTED_FORMATS,
        advice="Check which file was exported. The content decides, not the name of the file.",
    )


def _read_file(path: Path, options: ReadOptions) -> Scan:
    if detect_format(_read_head(path)) == "zip":
        return _read_files(archive.unpack(path, options.scratch, options.limits, _is_image), options)
    return _find_reader(path).read([path], options)


def _read_folder(folder: Path, options: ReadOptions) -> Scan:
    files = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            files.append(path)
        if len(files) > options.limits.max_files:
            raise UnsafeArchive(
                f"The folder contains more than {options.limits.max_files} files.",
                expected="one series.",
                advice="Send only the folder of the series.",
            )
    if not files:
        raise EmptyUpload("The folder contains no files.", expected=ACCEPTED_FORMATS, advice="Check the folder.")
    if len(files) == 1:
        return _read_file(files[0], options)
    return _read_files(sorted(files), options)


def _read_files(files: Iterable[Path], options: ReadOptions) -> Scan:
    """Read the one scan among many files; files of other formats are ignored."""
    found: dict[str, list[Path]] = {reader.format: [] for reader in READERS}
    for path in files:
        try:
            found[_find_reader(path).format].append(path)
        except CounterpartError:
            continue
    scans = [(reader, found[reader.format]) for reader in READERS if found[reader.format]]
    if not scans:
        raise NoImageInArchive(
            "None of the files is an image in a format that Counterpart reads.",
            expected=ACCEPTED_FORMATS,
            advice="Pack the images themselves. An archive inside an archive is not opened.",
        )
    reader, paths = scans[0]
    if len(scans) > 1 or (reader.one_file and len(paths) > 1):
        counts = " and ".join(f"{len(paths)} {reader.title} files" for reader, paths in scans)
        raise SeveralSeries(
            f"The upload contains {counts}.",
            expected="one scan: one file, or the DICOM files of one series.",
            advice="Send one scan at a time.",
        )
    return reader.read(paths, options)


def _find_reader(path: Path) -> Reader:
    """Return the reader for a file of one of the formats, plain or gzipped.

    Raises
    ------
    EmptyUpload, NotAnImageFormat, TruncatedFile
        If the file is empty, not an image, or a damaged gzip stream.
    """
    head = _read_head(path)
    name = detect_format(head)
    is_gzipped = name == "gzip"
    if is_gzipped:
        head = read_gzipped_head(path)
    for reader in READERS:
        if reader.matches(head) and (reader.may_be_gzipped or not is_gzipped):
            return reader
    titles = " or ".join(reader.title for reader in READERS if reader.may_be_gzipped)
    raise NotAnImageFormat(
        f"The {name} file does not contain a {titles} image.",
        expected=ACCEPTED_FORMATS,
        advice="Check which file was compressed. Send a DICOM series as a zip.",
    )


def _is_image(head: bytes) -> bool:
    """Return True if a file of a zip is extracted; a zip inside a zip is not."""
    try:
        return detect_format(head) != "zip"
    except NotAnImageFormat:
        return False


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)
