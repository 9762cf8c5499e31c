"""Reader for NIfTI-1 and NIfTI-2 files. nibabel derives the geometry."""

import io
import math
from typing import BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder
from nibabel.nifti1 import Nifti1Extensions

from app.errors import NotAnImageFormat
from app.ingest.limits import HEAD_BYTES, Limits
from app.ingest.volume_file import (
    HEADER_ERRORS,
    check_complete,
    check_size,
    check_type,
    invalid_header,
    looks_hounsfield,
    truncated,
)
from app.volume import Affine, Scan, Source, Volume

Header = nib.Nifti1Header  # the header class of NIfTI-2 derives from it
Image = nib.Nifti1Image

_NIFTI1_BYTES, _NIFTI1_MAGIC_OFFSET = 348, 344
_NIFTI2_BYTES = 540
_NIFTI1_MAGIC = b"n+1\0"
_NIFTI2_MAGIC = b"n+2\0\r\n\x1a\n"
_PAIR_MAGICS = (b"ni1\0", b"ni2\0")
_NIFTI2_SIZES = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # sizeof_hdr 540, little and big endian
_MM_PER_UNIT = {"mm": 1.0, "meter": 1000.0, "micron": 0.001}
# A sform and a qform that differ by less than this are the same geometry, written twice.
_SAME_POSITION_MM = 0.5


class _NoExtensions(Nifti1Extensions):
    """Header extensions that are not parsed: they are not needed, and nibabel would parse DICOM in them."""

    @classmethod
    def from_fileobj(cls, fileobj: object, size: int, byteswap: bool) -> "_NoExtensions":  # noqa: ARG003, FBT001
        return cls()


class _Header1(nib.Nifti1Header):
    exts_klass = _NoExtensions


class _Header2(nib.Nifti2Header):
    exts_klass = _NoExtensions


class _Image1(nib.Nifti1Image):
    header_class = _Header1


class _Image2(nib.Nifti2Image):
    header_class = _Header2


def matches(head: bytes) -> bool:
    """Return True if the first bytes are those of a NIfTI file that contains its voxels.

    A NIfTI-1 file that ends inside its header is a truncated NIfTI file, not another format.

    Raises
    ------
    NotAnImageFormat
        If the bytes are the header of a NIfTI pair, whose voxels are in another file.
    """
    sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")}
    if _NIFTI1_BYTES in sizes:
        magic = head[_NIFTI1_MAGIC_OFFSET:_NIFTI1_BYTES]
        _refuse_pair(magic)
        return magic == _NIFTI1_MAGIC or len(head) < _NIFTI1_BYTES
    if _NIFTI2_BYTES in sizes:
        _refuse_pair(head[4:8])
        return _NIFTI2_MAGIC.startswith(head[4:12])
    return False


def _refuse_pair(magic: bytes) -> None:
    if magic in _PAIR_MAGICS:
        raise NotAnImageFormat(
            "The file is the header of a NIfTI pair (.hdr and .img) and does not contain the voxels.",
            expected="one NIfTI file with header and voxels (.nii, .nii.gz).",
            advice="Save the pair as one .nii file and send that.",
        )


def count_bytes(head: bytes, limits: Limits) -> int:
    """Return the number of bytes up to the last voxel: see `app.ingest.volume_file.VolumeFormat`."""
    return _count_bytes(_parse_header(head), limits)


def _parse_header(head: bytes) -> Header:
    header_class = nib.Nifti2Header if head.startswith(_NIFTI2_SIZES) else nib.Nifti1Header
    size = int(header_class.template_dtype.itemsize)
    if len(head) < size:
        raise truncated(f"The file ends inside its header, after {len(head)} bytes.")
    try:
        return header_class(head[:size], check=True)  # type: ignore[no-untyped-call]
    except HEADER_ERRORS:
        raise invalid_header() from None


def _count_bytes(header: Header, limits: Limits) -> int:
    try:
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
        size = int(offset)
    except HEADER_ERRORS:
        raise invalid_header() from None
    check_type(dtype, shape)
    count = math.prod(int(n) for n in shape)
    size += count * int(dtype.itemsize)
    check_size(count, size, limits)
    return size


def load(file: BinaryIO, limits: Limits) -> Scan:
    """Read an uncompressed NIfTI file: see `app.ingest.volume_file.VolumeFormat`."""
    file.seek(0)
    header = _parse_header(file.read(HEAD_BYTES))
    check_complete(file, _count_bytes(header, limits))
    image_class = _Image2 if isinstance(header, nib.Nifti2Header) else _Image1
    try:
        image = image_class.from_file_map({"image": FileHolder(fileobj=cast("io.IOBase", file))}, mmap=False)  # type: ignore[no-untyped-call]
        array = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (*HEADER_ERRORS, OSError):
        raise invalid_header() from None
    affine, notes = _affine_mm(image)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[..., np.newaxis]  # (X, Y) -> (X, Y, 1)
    code = int(image.header["sform_code"]) or int(image.header["qform_code"])
    source = Source(format="nifti", looks_hounsfield=looks_hounsfield(array), sform_code=code, notes=notes)
    return Scan(Volume(array, affine), source)


def _affine_mm(image: Image) -> tuple[Affine, tuple[str, ...]]:
    """Return the affine from voxel indices to RAS+ mm, and notes about assumptions."""
    header, notes = image.header, []
    affine = np.array(image.affine, dtype=np.float64)
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if not sform and not qform:
        notes.append(
            "The file states no position in space (sform and qform code 0). NIfTI's default position is used: left "
            "and right may be exchanged."
        )
    if sform and qform and (distance := _max_distance(header, image.shape)) > _SAME_POSITION_MM:
        notes.append(f"The sform and the qform of the file differ by up to {distance:.1f} mm. The sform is used.")
    try:
        unit = header.get_xyzt_units()[0]
    except KeyError:
        unit = "unknown"
    if unit == "unknown":
        notes.append("The file states no unit of length. Millimetres are assumed.")
    elif unit != "mm":
        notes.append(f"The unit of length of the file is {unit}. Lengths are converted to millimetres.")
        affine[:3] *= _MM_PER_UNIT[unit]
    return affine, tuple(notes)


def _max_distance(header: Header, shape: tuple[int, ...]) -> float:
    """Return the largest distance between the sform and the qform position of a corner, in the file's unit."""
    sizes = (*shape, 1, 1)[:3]
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in sizes], indexing="ij")).reshape(3, -1)
    difference = header.get_sform() - header.get_qform()
    shift = difference[:3, :3] @ corners + difference[:3, 3:]
    return float(np.linalg.norm(shift, axis=0).max())
