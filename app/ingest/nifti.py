"""NIfTI-1 and -2, plain or gzipped -> a scan. Geometry by nibabel's rules."""

import gzip
import io
import math
import tempfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.fileholders import FileHolder
from nibabel.spatialimages import HeaderDataError

from app.errors import (
    CounterpartError,
    InvalidHeader,
    NotAnImageFormat,
    NotAVolume,
    TooManyVoxels,
    TruncatedFile,
    UnsupportedPixels,
)
from app.ingest.archive import CHUNK_BYTES
from app.ingest.limits import Limits
from app.ingest.quiet import quiet
from app.ingest.sniff import ACCEPTED, HEAD_BYTES, sniff
from app.volume import Affine, Scan, Source, Volume

Header = nib.Nifti1Header  # NIfTI-2's header derives from it
Image = nib.Nifti1Image

_NIFTI2_SIZES = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # sizeof_hdr 540, little and big endian
_MM_PER_UNIT = {"mm": 1.0, "meter": 1000.0, "micron": 0.001}
# What nibabel raises for a header that cannot be; its text repeats the header's values.
_HEADER_FAULTS = (HeaderDataError, ImageFileError, ValueError, KeyError, OverflowError)
# Two placements of one scan that differ by less than this are the same, written twice.
_SAME_PLACE_MM = 0.5


def read(path: Path, scratch: Path, limits: Limits) -> Scan:
    """Read a NIfTI file, whatever its name.

    Parameters
    ----------
    path : Path
        A file that `sniff` calls "nifti" or "gzip".
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
            if file.read(2) != b"\x1f\x8b":
                return _read_plain(file, limits)
        with _inflated(path, scratch, limits) as file:
            return _read_plain(file, limits)


def is_gzipped_nifti(path: Path) -> bool:
    """Whether a NIfTI header is inside a gzipped file."""
    try:
        with gzip.open(path) as stream:
            return sniff(stream.read(HEAD_BYTES)) == "nifti"
    except (CounterpartError, OSError, EOFError, zlib.error):
        return False


def _inflated(path: Path, scratch: Path, limits: Limits) -> BinaryIO:
    """The inside of a gzipped file, as long as its header announces and no longer."""
    scratch.mkdir(parents=True, exist_ok=True)
    out = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - closed by the caller
    try:
        with gzip.open(path) as stream:
            head = stream.read(HEAD_BYTES)
            _check_inside(head)
            left = _announced_bytes(_header(head), limits) - len(head)
            out.write(head)
            while left > 0 and (chunk := stream.read(min(left, CHUNK_BYTES))):
                out.write(chunk)
                left -= len(chunk)
            stream.read(1)  # the end of the stream, where its checksum is compared
    except (OSError, EOFError, zlib.error) as failure:
        out.close()
        if isinstance(failure, OSError) and not isinstance(failure, gzip.BadGzipFile):
            raise  # the disk's fault, not the file's
        raise _truncated("The gzip stream ends early or is damaged.") from None
    except CounterpartError:
        out.close()
        raise
    out.seek(0)
    return out


def _check_inside(head: bytes) -> None:
    try:
        if head and sniff(head) == "nifti":
            return
    except NotAnImageFormat:
        pass
    raise NotAnImageFormat(
        "The gzipped file holds no NIfTI image.",
        expected=ACCEPTED,
        advice="Check what was compressed; send DICOM as a zip.",
    )


def _header(head: bytes) -> Header:
    """The header alone, nothing of the voxels."""
    kind = nib.Nifti2Header if head.startswith(_NIFTI2_SIZES) else nib.Nifti1Header
    size = int(kind.template_dtype.itemsize)
    if len(head) < size:
        raise _truncated(f"The file ends after {len(head)} bytes, inside its header.")
    try:
        return kind(head[:size], check=True)  # type: ignore[no-untyped-call]
    except _HEADER_FAULTS:
        raise _unreadable_header() from None


def _announced_bytes(header: Header, limits: Limits) -> int:
    """Bytes from the file's start to its last voxel, before anything of that size is allocated or written.

    Raises
    ------
    NotAVolume, UnsupportedPixels
        Not one grey value a voxel, or not one volume.
    TooManyVoxels
        More than the limits.
    """
    try:
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
        size = int(offset)
    except _HEADER_FAULTS:
        raise _unreadable_header() from None
    _check_kind(dtype, shape)
    count = math.prod(int(n) for n in shape)
    size += count * int(dtype.itemsize)
    if count > limits.max_voxels or size > limits.max_inflated_bytes:
        raise TooManyVoxels(
            f"The header announces {count} voxels in {size / 1e6:.0f} MB.",
            expected=f"at most {limits.max_voxels} voxels and {limits.max_inflated_bytes / 1e6:.0f} MB.",
            advice="Crop the scan to the head, or resample it.",
        )
    return size


def _read_plain(file: BinaryIO, limits: Limits) -> Scan:
    file.seek(0)
    header = _header(file.read(HEAD_BYTES))
    announced = _announced_bytes(header, limits)
    present = file.seek(0, 2)
    if present < announced:
        raise _truncated(f"The file holds {present} of the {announced} bytes that its header announces.")
    file.seek(0)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    try:
        image = kind.from_file_map({"image": FileHolder(fileobj=cast("io.IOBase", file))}, mmap=False)
        array = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (*_HEADER_FAULTS, OSError):
        raise _unreadable_header() from None
    affine, notes = _affine(image)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[..., np.newaxis]  # (X, Y) -> (X, Y, 1)
    code = int(image.header["sform_code"]) or int(image.header["qform_code"])
    return Scan(Volume(array, affine), Source(format="nifti", sform_code=code, notes=notes))


def _check_kind(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """One grey value a voxel, one volume a file."""
    if dtype.fields is not None or dtype.kind == "c":
        raise NotAVolume(
            "The voxels are colours." if dtype.fields is not None else "The voxels are complex numbers.",
            expected="one grey value a voxel.",
            advice="Convert the image to grey values (the magnitude of complex data) and send that.",
        )
    if dtype.kind not in "iuf":
        raise UnsupportedPixels(
            "The voxels have a type that is not a number.",
            expected="integers or floating-point numbers.",
            advice="Save the image as int16 or float32.",
        )
    if len(shape) < 2 or min(shape) < 1 or math.prod(shape[3:]) != 1:
        raise NotAVolume(
            f"The image has the shape {tuple(shape)}.",
            expected="three non-empty axes, or a fourth of length one.",
            advice="Send one volume: split a time series, and pick one.",
        )


def _affine(image: Image) -> tuple[Affine, tuple[str, ...]]:
    """Voxel indices to RAS+ millimetres, and what had to be assumed."""
    header, notes = image.header, []
    affine = np.array(image.affine, dtype=np.float64)
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not sform and not qform:
        notes.append(
            "The file states no position in space (sform and qform code 0): NIfTI's default was taken, and left may "
            "be right."
        )
    if sform and qform and (apart := _farthest_mm(header, image.shape)) > _SAME_PLACE_MM:
        notes.append(f"The file's sform and qform disagree by up to {apart:.1f} mm: the sform was taken.")
    try:
        unit = header.get_xyzt_units()[0]
    except KeyError:
        unit = "unknown"
    if unit == "unknown":
        notes.append("The file states no unit of length: millimetres were assumed.")
    elif unit != "mm":
        notes.append(f"The file's unit of length is the {unit}: converted to millimetres.")
        affine[:3] *= _MM_PER_UNIT[unit]
    return affine, tuple(notes)


def _farthest_mm(header: Header, shape: tuple[int, ...]) -> float:
    """How far apart sform and qform put a corner of the volume, in the file's unit."""
    space = (*shape, 1, 1)[:3]
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in space], indexing="ij")).reshape(3, -1)
    difference = header.get_sform() - header.get_qform()
    shift = difference[:3, :3] @ corners + difference[:3, 3:]
    return float(np.linalg.norm(shift, axis=0).max())


def _truncated(found: str) -> TruncatedFile:
    return TruncatedFile(
        found,
        expected="a complete file.",
        advice="Send it again, and compare its size with the original.",
    )


def _unreadable_header() -> InvalidHeader:
    return InvalidHeader(
        "The NIfTI header contradicts itself or holds values that the standard does not allow.",
        expected="a valid data type, shape, scaling and orientation.",
        advice="Convert the original again with a current tool.",
    )
