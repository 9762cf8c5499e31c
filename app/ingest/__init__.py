"""Bytes -> a scan: the only place that knows file formats on the way in."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from app.errors import CounterpartError, EmptyUpload, NoImageInArchive, SeveralSeries, UnsafeArchive
from app.ingest import archive, single
from app.ingest.limits import STANDARD, Limits
from app.ingest.sniff import ACCEPTED, HEAD_BYTES, Format, sniff
from app.volume import Geometry, Scan

__all__ = ["ACCEPTED", "HEAD_BYTES", "STANDARD", "Format", "Limits", "read", "sniff"]


@dataclass(frozen=True)
class _Wanted:
    series: str | None
    geometry: Geometry
    limits: Limits
    scratch: Path


def read(
    path: Path,
    *,
    scratch: Path,
    series: str | None = None,
    geometry: Geometry = "refuse",
    limits: Limits = STANDARD,
) -> Scan:
    """Read one scan, whatever its file's name.

    Parameters
    ----------
    path : Path
        A NIfTI or MGH file (gzipped or not), a zip of a DICOM series or of one such file, one DICOM
        file, or a folder of DICOM files.
    scratch : Path
        The caller's folder, made if it is missing, for what an archive holds; the instances of the
        scan's source stay there.
    series : str, optional
        SeriesInstanceUID to take where there are several; with "/2", the second stack of that series.
    geometry : {"refuse", "resample"}, optional
        What to do with slices that are missing, tilted or unevenly spaced: a NIfTI file says nothing of them.
    limits : Limits, optional
        What the upload may cost.

    Raises
    ------
    CounterpartError
        One leaf of `UploadError` or `UnreadableScan`, or `WrongModality`, for everything that an
        upload can do wrong.
    """
    wanted = _Wanted(series, geometry, limits, scratch)
    return _read_folder(path, wanted) if path.is_dir() else _read_file(path, wanted)


def _read_file(path: Path, wanted: _Wanted) -> Scan:
    kind = sniff(_head(path))
    if kind == "zip":
        return _read_files(archive.unpack(path, wanted.scratch, wanted.limits), wanted)
    if kind == "dicom":
        return _read_dicom([path], wanted)
    return single.read(path, wanted.scratch, wanted.limits)


def _read_folder(folder: Path, wanted: _Wanted) -> Scan:
    files = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            files.append(path)
        if len(files) > wanted.limits.max_files:
            raise UnsafeArchive(
                f"The folder holds more than {wanted.limits.max_files} files.",
                expected="one series.",
                advice="Send the folder of the series alone.",
            )
    if not files:
        raise EmptyUpload("The folder holds no files.", expected=ACCEPTED, advice="Check the folder.")
    if len(files) == 1:
        return _read_file(files[0], wanted)
    return _read_files(sorted(files), wanted)


def _read_files(files: Iterable[Path], wanted: _Wanted) -> Scan:
    """One scan among many files, sorted by what they are."""
    volumes, instances = [], []
    for path in files:
        kind = _kind(path)
        if kind == "dicom":
            instances.append(path)
        elif kind in {"nifti", "mgh"} or (kind == "gzip" and single.is_gzipped_volume(path)):
            volumes.append(path)
    if not volumes and not instances:
        raise NoImageInArchive(
            "No file in it is a DICOM, NIfTI or MGH image.",
            expected=ACCEPTED,
            advice="Pack the images themselves: an archive inside an archive is not opened.",
        )
    if len(volumes) > 1 or (volumes and instances):
        raise SeveralSeries(
            f"It holds {len(volumes)} NIfTI or MGH and {len(instances)} DICOM files.",
            expected="one NIfTI or MGH file, or the DICOM files of one series.",
            advice="Send one scan at a time.",
        )
    if volumes:
        return single.read(volumes[0], wanted.scratch, wanted.limits)
    return _read_dicom(instances, wanted)


def _read_dicom(files: list[Path], wanted: _Wanted) -> Scan:
    # Two seconds of imports that a NIfTI file does not need.
    from app.ingest import dicom  # noqa: PLC0415

    return dicom.read(files, wanted.series, wanted.geometry, wanted.limits)


def _kind(path: Path) -> Format | None:
    try:
        return sniff(_head(path))
    except CounterpartError:
        return None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)
