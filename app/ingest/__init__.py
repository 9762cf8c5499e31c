"""Bytes -> a scan: the only place that knows file formats on the way in."""

from collections.abc import Iterable
from pathlib import Path

from app.errors import CounterpartError, EmptyUpload, NoImageInArchive, SeveralSeries, UnsafeArchive
from app.ingest import archive, nifti
from app.ingest.limits import STANDARD, Limits
from app.ingest.sniff import ACCEPTED, HEAD_BYTES, Format, sniff
from app.volume import Scan

__all__ = ["HEAD_BYTES", "STANDARD", "Format", "Limits", "read", "sniff"]


def read(path: Path, *, scratch: Path, series: str | None = None, limits: Limits = STANDARD) -> Scan:
    """Read one scan, whatever its file's name.

    Parameters
    ----------
    path : Path
        A NIfTI file (gzipped or not), a zip of a DICOM series or of one NIfTI file, one DICOM
        file, or a folder of DICOM files.
    scratch : Path
        The caller's folder, made if it is missing, for what an archive holds; the instances of the
        scan's source stay there.
    series : str, optional
        SeriesInstanceUID to take where there are several.
    limits : Limits, optional
        What the upload may cost.

    Raises
    ------
    CounterpartError
        One leaf of `UploadError` or `UnreadableScan`, or `WrongModality`, for everything that an
        upload can do wrong.
    """
    if path.is_dir():
        return _read_folder(path, scratch, series, limits)
    kind = sniff(_head(path))
    if kind == "zip":
        return _read_files(archive.unpack(path, scratch, limits), scratch, series, limits)
    if kind == "dicom":
        return _read_dicom([path], series, limits)
    return nifti.read(path, scratch, limits)


def _read_folder(folder: Path, scratch: Path, series: str | None, limits: Limits) -> Scan:
    files = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            files.append(path)
        if len(files) > limits.max_files:
            raise UnsafeArchive(
                f"The folder holds more than {limits.max_files} files.",
                expected="one series.",
                advice="Send the folder of the series alone.",
            )
    if not files:
        raise EmptyUpload("The folder holds no files.", expected=ACCEPTED, advice="Check the folder.")
    if len(files) == 1:
        return read(files[0], scratch=scratch, series=series, limits=limits)
    return _read_files(sorted(files), scratch, series, limits)


def _read_files(files: Iterable[Path], scratch: Path, series: str | None, limits: Limits) -> Scan:
    """One scan among many files, sorted by what they are."""
    volumes, instances = [], []
    for path in files:
        kind = _kind(path)
        if kind == "dicom":
            instances.append(path)
        elif kind == "nifti" or (kind == "gzip" and nifti.is_gzipped_nifti(path)):
            volumes.append(path)
    if not volumes and not instances:
        raise NoImageInArchive(
            "No file in it is a DICOM or NIfTI image.",
            expected=ACCEPTED,
            advice="Pack the images themselves: an archive inside an archive is not opened.",
        )
    if len(volumes) > 1 or (volumes and instances):
        raise SeveralSeries(
            f"It holds {len(volumes)} NIfTI and {len(instances)} DICOM files.",
            expected="one NIfTI file, or the DICOM files of one series.",
            advice="Send one scan at a time.",
        )
    return nifti.read(volumes[0], scratch, limits) if volumes else _read_dicom(instances, series, limits)


def _read_dicom(files: list[Path], series: str | None, limits: Limits) -> Scan:
    # Two seconds of imports that a NIfTI file does not need.
    from app.ingest import dicom  # noqa: PLC0415

    return dicom.read(files, series, limits)


def _kind(path: Path) -> Format | None:
    try:
        return sniff(_head(path))
    except CounterpartError:
        return None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)
