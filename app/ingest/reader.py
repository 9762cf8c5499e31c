"""Read a scan of any supported format.

A format is one entry of `READERS`. Everything here iterates over them: format detection, reading of a file, an
archive or a folder, and the list of formats in error messages.
"""

import os
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import NamedTemporaryFile

from app.errors import (
    CounterpartError,
    EmptyUpload,
    NoImageInArchive,
    NotAnImageFormat,
    SeveralSeries,
    UnsafeArchive,
    UploadTooLarge,
)
from app.ingest import archive, mgh, nifti
from app.ingest.limits import CHUNK_BYTES, DEFAULT_LIMITS, HEAD_BYTES, UNPACKED_PREFIX, Limits, is_blank
from app.ingest.volume_file import (
    GZIP_SIGNATURE,
    VolumeFormat,
    check_planes,
    read_inflated_head,
    read_volume_file,
    repair_outliers,
)
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
# Results of Counterpart in a folder that is read again. Their report tells them from other DICOM files of these names.
RESULT_REPORT = "report.json"
RESULT_DICOM_NAMES = ("segmentation.dcm", "report.dcm", "capture.dcm", "anomaly.dcm")
_REPORT_MARK, _REPORT_HEAD_BYTES = b'"research_use_only": true', 1000
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
    sequences: Collection[str] = ()


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
        if image := nifti.find_image(path):
            path = nifti.join_pair(path, image, options.scratch, options.limits)
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

    return read_dicom(files, options.series, options.geometry, options.limits, options.sequences)


_NIFTI = _volume_reader("nifti", "NIfTI", ".nii, .nii.gz", nifti)
READERS: tuple[Reader, ...] = (
    _NIFTI,
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
    sequences: Collection[str] = (),
) -> Scan:
    """Read one scan. The format is detected from the content; file names do not matter.

    Parameters
    ----------
    path : Path
        A file of a supported format (NIfTI and MGH may be gzipped), a zip of such a file or of a DICOM series,
        or a folder of them. A pipe is copied into `scratch` first. Symbolic links are followed.
    scratch : Path
        Folder for extracted files. It is created if it is missing. Keep it until the DICOM results are
        written, because `Scan.source.instances` names files in it.
    series : str, optional
        SeriesInstanceUID of the series to read if there are several. "<UID>/2" is the second stack of a series.
    geometry : {"refuse", "resample"}, optional
        Refuse or resample DICOM slices that are missing, tilted or unevenly spaced.
    limits : Limits, optional
        Limits on the size of the upload.
    sequences : collection of str, optional
        Sequences of MR that the available models are trained on. Among several DICOM series, one of these is preferred.

    Raises
    ------
    CounterpartError
        A subclass of `UploadError` or `UnreadableScan`, or `WrongModality`, for every fault of the upload.
    """
    options = ReadOptions(scratch, series, geometry, limits, sequences)
    if path.is_dir():
        return check_planes(repair_outliers(_read_folder(path, options)))
    if path.exists() and not path.is_file():
        path = _copy_pipe(path, options)
    return check_planes(repair_outliers(_read_file(path, options)))


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


def _copy_pipe(path: Path, options: ReadOptions) -> Path:
    """Copy what comes from a pipe or device, which can be read only once, into a file."""
    options.scratch.mkdir(parents=True, exist_ok=True)
    remaining = options.limits.max_inflated_bytes
    with path.open("rb") as source, NamedTemporaryFile(dir=options.scratch, prefix="pipe-", delete=False) as copy:
        while chunk := source.read(CHUNK_BYTES):
            remaining -= len(chunk)
            if remaining < 0:
                raise UploadTooLarge(
                    f"More than {options.limits.max_inflated_bytes / 1e6:.0f} MB came from the pipe.",
                    expected="one scan.",
                    advice="Check which program writes into the pipe.",
                )
            copy.write(chunk)
    return Path(copy.name)


def _read_file(path: Path, options: ReadOptions) -> Scan:
    path = nifti.find_header(path) or path
    if nifti.find_image(path) is None and detect_format(_read_head(path)) == "zip":
        return _read_files(archive.unpack(path, options.scratch, options.limits, _is_extracted), options)
    return _find_reader(path).read([path], options)


def _read_folder(folder: Path, options: ReadOptions) -> Scan:
    files, broken_links = _list_files(folder, options.limits)
    if not files:
        links = f"{broken_links} symbolic links whose targets do not exist, and no files"
        raise EmptyUpload(
            f"The folder contains {links if broken_links else 'no files'}.",
            expected=ACCEPTED_FORMATS,
            advice="Fetch the files behind the links." if broken_links else "Check the folder.",
        )
    scan = _read_file(files[0], options) if len(files) == 1 else _read_files(_without_results(files), options)
    if not broken_links:
        return scan
    note = f"The folder contains {broken_links} symbolic links whose targets do not exist. They are left out."
    return replace(scan, source=replace(scan.source, notes=(*scan.source.notes, note)))


def _list_files(folder: Path, limits: Limits) -> tuple[list[Path], int]:
    """Return the files in a folder, sorted, each once, and the number of symbolic links without a target.

    Links are followed, except to a folder that contains this one.
    """
    files: list[Path] = []
    broken_links = 0
    above = {_identity(parent) for parent in folder.resolve().parents}
    visited = set()
    for name, folders, names in os.walk(folder, followlinks=True):
        visited.add(_identity(Path(name)))
        # A killed run can leave copies of its scan in an unpacked folder.
        folders[:] = [
            other
            for other in folders
            if not other.startswith(UNPACKED_PREFIX) and _identity(Path(name, other)) not in above | visited
        ]
        for path in (Path(name, other) for other in names):
            if path.is_file():
                files.append(path)
            elif path.is_symlink() and not path.exists():
                broken_links += 1
        if len(files) > limits.max_files:
            raise UnsafeArchive(
                f"The folder contains more than {limits.max_files} files.",
                expected="one series.",
                advice="Send only the folder of the series.",
            )
    by_identity: dict[tuple[int, int], Path] = {}
    for path in sorted(files, key=lambda path: (path.is_symlink(), path)):
        by_identity.setdefault(_identity(path), path)
    return sorted(by_identity.values()), broken_links


def _identity(path: Path) -> tuple[int, int]:
    """Return what identifies a file under any name."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _without_results(files: Sequence[Path]) -> list[Path]:
    """Leave out the DICOM results that Counterpart wrote beside a report.json. NIfTI results are known by content."""
    written = {path.parent for path in files if path.name == RESULT_REPORT and _is_report(path)}
    return [path for path in files if not (path.parent in written and path.name in RESULT_DICOM_NAMES)]


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return _REPORT_MARK in file.read(_REPORT_HEAD_BYTES)


def _read_files(files: Iterable[Path], options: ReadOptions) -> Scan:
    """Read the one scan among many files; files of other formats and results of Counterpart are ignored."""
    files = list(files)
    found: dict[str, list[Path]] = {reader.format: [] for reader in READERS}
    images = {image for path in files if (image := nifti.find_image(path))}
    blank = {path for path in files if path not in images and is_blank(_read_head(path))}
    results, lone_header = 0, None
    skipped = images | blank
    for path in files:
        if path in skipped:
            continue
        try:
            reader = _find_reader(path)
            if reader is _NIFTI and nifti.is_result(read_inflated_head(path)):
                results += 1
            else:
                found[reader.format].append(path)
        except NotAnImageFormat as error:
            lone_header = error if nifti.is_pair_header(read_inflated_head(path)) else lone_header
        except CounterpartError:
            continue
    # A file without content may be an image of the series only if it is named like one. The reader counts it.
    endings = {archive.ending(path.name) for path in found["dicom"]}
    found["dicom"] += sorted(path for path in blank if archive.ending(path.name) in endings)
    scans = [(reader, found[reader.format]) for reader in READERS if found[reader.format]]
    if not scans and lone_header:
        raise lone_header
    if not scans:
        raise NoImageInArchive(
            "The only images are results of Counterpart."
            if results
            else "None of the files is an image in a format that Counterpart reads.",
            expected=ACCEPTED_FORMATS,
            advice="Pack the images themselves. An archive inside an archive is not opened.",
        )
    reader, paths = scans[0]
    if len(scans) > 1 or (reader.one_file and len(paths) > 1):
        counts = " and ".join(f"{len(group)} {each.title} files" for each, group in scans)
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
    if nifti.find_image(path):
        return _NIFTI
    name = detect_format(_read_head(path))
    is_gzipped = name == "gzip"
    head = read_inflated_head(path)
    for reader in READERS:
        if reader.matches(head) and (reader.may_be_gzipped or not is_gzipped):
            return reader
    titles = " or ".join(reader.title for reader in READERS if reader.may_be_gzipped)
    raise NotAnImageFormat(
        f"The {name} file does not contain a {titles} image.",
        expected=ACCEPTED_FORMATS,
        advice="Check which file was compressed. Send a DICOM series as a zip.",
    )


def _is_extracted(head: bytes) -> bool:
    """Return True if a file of a zip is extracted; a zip inside a zip is not.

    The lone header of a pair is extracted, so that the error can name it.
    """
    try:
        return nifti.is_pair_header(head) or detect_format(head) != "zip"
    except NotAnImageFormat:
        return False


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)
