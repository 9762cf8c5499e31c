"""NIfTI-1 and -2 -> a scan. Geometry by nibabel's rules."""

import io
import math
from typing import BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder
from nibabel.nifti1 import Nifti1Extensions

from app.ingest.announced import HEADER_FAULTS, check_kind, check_present, check_size, truncated, unreadable_header
from app.ingest.limits import Limits
from app.ingest.hounsfield import looks_hounsfield
from app.ingest.sniff import HEAD_BYTES
from app.volume import Affine, Scan, Source, Volume

Header = nib.Nifti1Header  # NIfTI-2's header derives from it
Image = nib.Nifti1Image


class _Unread(Nifti1Extensions):
    """No extensions: nothing here needs them, and nibabel parses those that call themselves DICOM."""

    @classmethod
    def from_fileobj(cls, fileobj: object, size: int, byteswap: bool) -> "_Unread":  # noqa: ARG003, FBT001
        return cls()


class _Header1(nib.Nifti1Header):
    exts_klass = _Unread


class _Header2(nib.Nifti2Header):
    exts_klass = _Unread


class _Image1(nib.Nifti1Image):
    header_class = _Header1


class _Image2(nib.Nifti2Image):
    header_class = _Header2


_NIFTI2_SIZES = (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # sizeof_hdr 540, little and big endian
_MM_PER_UNIT = {"mm": 1.0, "meter": 1000.0, "micron": 0.001}
# Two placements of one scan that differ by less than this are the same, written twice.
_SAME_PLACE_MM = 0.5


def _header(head: bytes) -> Header:
    """The header alone, nothing of the voxels."""
    kind = nib.Nifti2Header if head.startswith(_NIFTI2_SIZES) else nib.Nifti1Header
    size = int(kind.template_dtype.itemsize)
    if len(head) < size:
        raise truncated(f"The file ends after {len(head)} bytes, inside its header.")
    try:
        return kind(head[:size], check=True)  # type: ignore[no-untyped-call]
    except HEADER_FAULTS:
        raise unreadable_header() from None


def announced_bytes(head: bytes, limits: Limits) -> int:
    """Bytes from the file's start to its last voxel, before anything of that size is allocated or written.

    Raises
    ------
    NotAVolume, UnsupportedPixels
        Not one grey value a voxel, or not one volume.
    TooManyVoxels
        More than the limits.
    """
    return _announced(_header(head), limits)


def _announced(header: Header, limits: Limits) -> int:
    try:
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
        size = int(offset)
    except HEADER_FAULTS:
        raise unreadable_header() from None
    check_kind(dtype, shape)
    count = math.prod(int(n) for n in shape)
    size += count * int(dtype.itemsize)
    check_size(count, size, limits)
    return size


def load(file: BinaryIO, limits: Limits) -> Scan:
    """Read a plain NIfTI file, from its start.

    Raises
    ------
    CounterpartError
        What `app.ingest.single.read` raises.
    """
    file.seek(0)
    header = _header(file.read(HEAD_BYTES))
    announced = _announced(header, limits)
    check_present(file, announced)
    kind = _Image2 if isinstance(header, nib.Nifti2Header) else _Image1
    try:
        image = kind.from_file_map({"image": FileHolder(fileobj=cast("io.IOBase", file))}, mmap=False)  # type: ignore[no-untyped-call]
        array = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (*HEADER_FAULTS, OSError):
        raise unreadable_header() from None
    affine, notes = _affine(image)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[..., np.newaxis]  # (X, Y) -> (X, Y, 1)
    code = int(image.header["sform_code"]) or int(image.header["qform_code"])
    source = Source(format="nifti", looks_hounsfield=looks_hounsfield(array), sform_code=code, notes=notes)
    return Scan(Volume(array, affine), source)


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
