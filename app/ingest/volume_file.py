"""Reader for files that contain one whole volume (NIfTI, MGH), plain or gzipped, and checks of headers and voxels."""

import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from app.errors import (
    CounterpartError,
    InvalidHeader,
    InvalidVoxels,
    NotAVolume,
    TooManyVoxels,
    TruncatedFile,
    UnsupportedPixels,
)
from app.ingest.limits import CHUNK_BYTES, HEAD_BYTES, Limits
from app.volume import FloatArray, Scan

# Messages of nibabel contain values of a header, and go to standard error whatever the application has configured.
for _name in ("nibabel", "nibabel.global"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)

GZIP_SIGNATURE = b"\x1f\x8b"
# The stub of isal does not declare its error class as an exception.
InflateError: type[Exception] = isal_zlib.error  # type: ignore[assignment]
# Deflate makes 258 bytes of two bits at best.
MAX_DEFLATE_RATIO = 1032
# nibabel raises these for an invalid header. Their text repeats the header's values, so it is never shown.
HEADER_ERRORS = (HeaderDataError, ImageFileError, ValueError, KeyError, OverflowError)

# Air around the patient in CT. Scanners fill the outside of a round field of view with lower values.
AIR_HU = (-1050.0, -900.0)
MIN_AIR_FRACTION = 0.02

# A voxel beyond this multiple of the usual brightness is an outlier. In 476 real MR and CT scans the brightest voxel is
# at most 3.7 times as bright.
OUTLIER_FACTOR = 10.0
USUAL_PERCENTILE = 99.5
# More outliers than this share of the voxels are not single faults, and are left as they are.
MAX_OUTLIER_SHARE = 1e-5
# The usual brightness is measured on about this many voxels along each axis.
SAMPLES = 64

# A plane is dark or bright if its level differs from both neighbours by this factor. Anatomy changes the level of
# planes of a few millimetres much less, except near the ends of the head, where the level is low.
LEVEL_FACTOR = 3.0
LEVEL_PERCENTILE = 95
# Only planes as bright as this fraction of the usual level are compared.
MIN_LEVEL = 0.5
USUAL_LEVEL_PERCENTILE = 75
# A longer run of planes is not a single fault. A bright organ can fill several planes, so the second limit is lower.
MAX_EMPTY_RUN, MAX_SCALED_RUN = 8, 3
MIN_PLANES = 10


class VolumeFormat(Protocol):
    """A module that reads one format of which a file is a whole volume (`app.ingest.nifti`, `app.ingest.mgh`)."""

    def matches(self, head: bytes) -> bool:
        """Return True if the first `HEAD_BYTES` bytes of a file are those of this format."""

    def count_bytes(self, head: bytes, limits: Limits) -> int:
        """Return the number of bytes from the start of the file to its last voxel, according to the header.

        Raises
        ------
        TruncatedFile, InvalidHeader
            If the header is incomplete or invalid.
        NotAVolume, UnsupportedPixels
            If the image is not one volume of grey values.
        TooManyVoxels
            If the image is larger than `limits`.
        """

    def load(self, file: BinaryIO, limits: Limits) -> Scan:
        """Read an uncompressed file, with the errors of `read_volume_file`."""


def read_volume_file(path: Path, volume_format: VolumeFormat, scratch: Path, limits: Limits) -> Scan:
    """Read a file that is one volume, plain or gzipped.

    Parameters
    ----------
    path : Path
        File of `volume_format`; its name does not matter.
    volume_format : VolumeFormat
    scratch : Path
        Folder for the temporary file of a gzipped volume. It is created if it is missing.
    limits : Limits

    Raises
    ------
    TruncatedFile
        If the file ends before its last voxel, or the gzip stream is damaged.
    TooManyVoxels
        If the header states a size beyond `limits`.
    InvalidHeader, NotAVolume, UnsupportedPixels, InvalidVoxels, ConstantVoxels, InvalidGeometry
        If the image is not one grey volume with a position in space.
    """
    # A header or a voxel may have any value. The checks afterwards count what is not finite.
    with np.errstate(all="ignore"):
        with path.open("rb") as file:
            if file.read(len(GZIP_SIGNATURE)) != GZIP_SIGNATURE:
                return volume_format.load(file, limits)
        with _inflate(path, volume_format, scratch, limits) as file:
            return volume_format.load(file, limits)


def read_inflated_head(path: Path) -> bytes:
    """Return the first `HEAD_BYTES` bytes of a file, or those inside a gzipped file.

    Raises
    ------
    TruncatedFile
        If the gzip stream is damaged.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head.startswith(GZIP_SIGNATURE):
        return head
    try:
        with igzip.open(path) as stream:
            return bytes(stream.read(HEAD_BYTES))
    except (igzip.BadGzipFile, EOFError, InflateError):
        raise _damaged_gzip() from None


def _inflate(path: Path, volume_format: VolumeFormat, scratch: Path, limits: Limits) -> BinaryIO:
    """Inflate a gzipped file into a temporary file, up to the last voxel and one byte."""
    scratch.mkdir(parents=True, exist_ok=True)
    out = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - closed by the caller
    try:
        with igzip.open(path) as stream:
            head = stream.read(HEAD_BYTES)
            remaining = volume_format.count_bytes(head, limits) - len(head)
            if remaining > MAX_DEFLATE_RATIO * path.stat().st_size:
                raise truncated("The header states more bytes than a gzip file of this size can contain.")
            out.write(head)
            while remaining > 0 and (chunk := stream.read(min(remaining, CHUNK_BYTES))):
                out.write(chunk)
                remaining -= len(chunk)
            # At the end, the checksum is compared. One byte more shows that bytes were left out.
            out.write(stream.read(1))
    except (OSError, EOFError, InflateError) as failure:
        out.close()
        if isinstance(failure, OSError) and not isinstance(failure, igzip.BadGzipFile):
            raise  # a fault of the disk, not of the file
        raise _damaged_gzip() from None
    except CounterpartError:
        out.close()
        raise
    out.seek(0)
    return out


# ---- voxels ------------------------------------------------------------------------------------


def read_voxels(
    file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any], scaling: tuple[float | None, float | None]
) -> FloatArray:
    """Read voxels from the position of a file, first axis fastest, and scale them.

    The values are those of nibabel. It would need two to four times the memory of the result.

    Parameters
    ----------
    file : BinaryIO
    shape : tuple of int
    dtype : dtype
        Of the file.
    scaling : tuple of float or None
        Slope and intercept. None means 1 and 0.

    Returns
    -------
    ndarray of float32
        In Fortran order.
    """
    flat = np.empty(math.prod(shape), dtype=np.float32)
    step = max(1, CHUNK_BYTES // dtype.itemsize)
    # A value beyond float32 becomes infinite, and `Volume` counts it as an invalid voxel.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, flat.size, step):
            part = flat[start : start + step]
            raw = np.frombuffer(file.read(part.size * dtype.itemsize), dtype=dtype)
            if raw.size != part.size:
                raise truncated("The file ends before its last voxel.")
            part[:] = apply_read_scaling(raw, *scaling)
    return flat.reshape(shape, order="F")


def looks_hounsfield(array: FloatArray) -> bool:
    """Return True if at least 2 % of the voxels have the value of air in Hounsfield units.

    NIfTI and MGH files do not state their modality. A CT without air (skull-stripped, or clipped at 0) is not
    recognised.
    """
    low, high = AIR_HU
    return bool(np.mean((array >= low) & (array <= high)) >= MIN_AIR_FRACTION)


def repair_outliers(scan: Scan) -> Scan:
    """Replace the few voxels that are far beyond all others by the median of their neighbours, in place.

    The sign or scale of such a voxel makes no sense, such as -32768 or 1e30 in an MR scan. A scan is smoothed before it
    is sampled, so one such voxel would become a finding.

    Returns
    -------
    Scan
        With a note if voxels were replaced.
    """
    array = scan.volume.array
    limit = OUTLIER_FACTOR * _usual_brightness(array)
    if not limit or max(float(array.max()), -float(array.min())) <= limit:
        return scan
    outliers = np.argwhere((array > limit) | (array < -limit))
    if len(outliers) > max(1.0, MAX_OUTLIER_SHARE * array.size):
        return scan
    repaired = []
    for voxel in outliers:
        around = array[tuple(slice(max(0, i - 1), i + 2) for i in voxel)]
        usable = around[np.abs(around) <= limit]
        repaired.append(np.median(usable) if usable.size else 0.0)
    array[tuple(outliers.T)] = repaired
    note = (
        f"{len(outliers)} of {array.size} voxels were more than {OUTLIER_FACTOR:.0f} times as bright or dark as all "
        "others. The median of their neighbours is used instead."
    )
    return replace(scan, source=replace(scan.source, notes=(*scan.source.notes, note)))


def _usual_brightness(array: FloatArray) -> float:
    """Return a high percentile of the absolute values other than 0, from a sample of the voxels."""
    sample = np.abs(array[tuple(slice(None, None, max(1, n // SAMPLES)) for n in array.shape)])
    present = sample[sample > 0]
    return float(np.percentile(present, USUAL_PERCENTILE)) if present.size else 0.0


# ---- checks of a header ------------------------------------------------------------------------


# ---- planes of another scale -------------------------------------------------------------------


@dataclass(frozen=True)
class FaultyPlanes:
    """Run of planes that differ from the planes on both sides.

    Attributes
    ----------
    axis : int
    first, last : int
        Indices along the axis.
    empty : bool
        Every voxel of each plane has one value.
    """

    axis: int
    first: int
    last: int
    empty: bool

    def describe(self, count: int) -> str:
        """Return the numbers of the planes, for a sentence."""
        numbers = f"{self.first + 1}" if self.first == self.last else f"{self.first + 1} to {self.last + 1}"
        return f"plane {numbers} of {count} along axis {self.axis + 1}"


def check_planes(scan: Scan) -> Scan:
    """Refuse empty planes inside a scan, and warn of planes of another scale.

    A slice that was lost in a transfer, or whose rescale differs, changes the intensities of the whole scan, and
    nothing is found in it.

    Returns
    -------
    Scan
        With a warning if planes are much darker or brighter than their neighbours.

    Raises
    ------
    InvalidVoxels
        If planes between others are empty.
    """
    shape = scan.volume.shape
    faults = [fault for axis in range(3) for fault in find_faulty_planes(scan.volume.array, axis)]
    empty = [fault for fault in faults if fault.empty]
    if empty:
        raise InvalidVoxels(
            f"Empty planes are inside the scan, {sum(fault.last - fault.first + 1 for fault in empty)} in all: "
            f"{empty[0].describe(shape[empty[0].axis])}{'' if len(empty) == 1 else ', and more'}.",
            expected="an image in every slice between the first and the last.",
            advice="Export the scan again, and check that every slice arrived.",
        )
    if not faults:
        return scan
    warning = (
        f"A part of the scan is at least {LEVEL_FACTOR:.0f} times as bright or dark as the planes on both sides: "
        f"{faults[0].describe(shape[faults[0].axis])}. It may have another scale, and the result may be wrong."
    )
    return replace(scan, source=replace(scan.source, warnings=(*scan.source.warnings, warning)))


def find_faulty_planes(array: FloatArray, axis: int) -> Iterator[FaultyPlanes]:
    """Yield the runs of planes across an axis that differ from the planes on both sides."""
    planes = np.moveaxis(array, axis, 0)
    if len(planes) < MIN_PLANES:
        return
    levels = _measure_levels(planes)
    usual = float(np.percentile(levels, USUAL_LEVEL_PERCENTILE))
    start = 1
    while start < len(planes) - 1:
        stop = _find_end(levels, start, usual)
        if stop > start:
            empty = all(plane.min() == plane.max() for plane in planes[start:stop])
            if empty or stop - start <= MAX_SCALED_RUN:
                yield FaultyPlanes(axis, start, stop - 1, empty)
        start = max(stop, start + 1)


def _measure_levels(planes: FloatArray) -> FloatArray:
    """Return a high percentile of each plane above the lowest value, from a sample of its voxels."""
    steps = tuple(slice(None, None, max(1, n // SAMPLES)) for n in planes.shape[1:])
    sample = planes[(slice(None), *steps)].reshape(len(planes), -1)
    return np.asarray(np.percentile(sample, LEVEL_PERCENTILE, axis=1) - sample.min(), dtype=np.float64)


def _find_end(levels: FloatArray, start: int, usual: float) -> int:
    """Return the index behind the run of dark or bright planes that begins at `start`, or `start` if there is none."""
    before = levels[start - 1]
    for stop in range(start + 1, min(start + MAX_EMPTY_RUN + 1, len(levels))):
        run, sides = levels[start:stop], (before, levels[stop])
        dark = run.max() * LEVEL_FACTOR < min(sides) and min(sides) > MIN_LEVEL * usual
        bright = run.min() > LEVEL_FACTOR * max(sides) and run.min() > LEVEL_FACTOR * MIN_LEVEL * usual
        if dark or bright:
            return stop
    return start


# ---- headers -----------------------------------------------------------------------------------


def check_type(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Raise an error unless a file has one grey value for each voxel and one volume.

    Raises
    ------
    NotAVolume, UnsupportedPixels
    """
    if dtype.fields is not None or dtype.kind == "c":
        raise NotAVolume(
            "The voxels are colours." if dtype.fields is not None else "The voxels are complex numbers.",
            expected="one grey value for each voxel.",
            advice="Convert the image to grey values (complex data to its magnitude) and send that.",
        )
    if dtype.kind not in "iuf":
        raise UnsupportedPixels(
            "The data type of the voxels is not a number.",
            expected="integers or floating-point numbers.",
            advice="Save the image as int16 or float32.",
        )
    if len(shape) < 2 or min(shape) < 1 or math.prod(shape[3:]) != 1:
        raise NotAVolume(
            f"The image has the shape {tuple(shape)}.",
            expected="three axes with at least one voxel each; a fourth axis must have the length 1.",
            advice="Send one volume. Split a time series and choose one of its volumes.",
        )


def check_size(count: int, size: int, limits: Limits) -> None:
    """Raise `TooManyVoxels` if a header states more voxels or bytes than `limits` allows."""
    if count > limits.max_voxels or size > limits.max_inflated_bytes:
        raise TooManyVoxels(
            f"The header states {count} voxels in {size / 1e6:.0f} MB.",
            expected=f"at most {limits.max_voxels} voxels and {limits.max_inflated_bytes / 1e6:.0f} MB.",
            advice="Crop the scan to the head, or resample it to larger voxels.",
        )


def check_complete(file: BinaryIO, expected_bytes: int) -> None:
    """Raise `TruncatedFile` if a file ends before its last voxel; else go to the start of the file."""
    present = file.seek(0, 2)
    if present < expected_bytes:
        raise truncated(f"The file has {present} bytes, but its header states {expected_bytes} bytes.")
    file.seek(0)


def truncated(found: str) -> TruncatedFile:
    """Return the error for a file that ends too early."""
    return TruncatedFile(
        found,
        expected="a complete file.",
        advice="Send the file again, and compare its size with the original.",
    )


def invalid_header() -> InvalidHeader:
    """Return the error for a header that nibabel refuses."""
    return InvalidHeader(
        "The header contradicts itself or contains values that the standard does not allow.",
        expected="a valid data type, shape, scaling and orientation.",
        advice="Convert the original again with a current tool.",
    )


def _damaged_gzip() -> TruncatedFile:
    return truncated("The gzip stream is incomplete or damaged.")
