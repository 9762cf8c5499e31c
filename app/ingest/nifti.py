"""Reader for NIfTI-1 and NIfTI-2 files. nibabel derives the geometry.

A pair of a header (.hdr) and an image (.img), NIfTI or Analyze 7.5, is joined into one NIfTI file.
"""

import io
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip

from app.errors import InvalidGeometry, InvalidHeader, NotAnImageFormat
from app.ingest.limits import CHUNK_BYTES, HEAD_BYTES, Limits
from app.ingest.volume_file import (
    GZIP_SIGNATURE,
    HEADER_ERRORS,
    InflateError,
    check_complete,
    check_size,
    check_type,
    invalid_header,
    looks_hounsfield,
    read_inflated_head,
    read_voxels,
    truncated,
)
from app.volume import RESULT_PREFIX, RESULT_SUFFIX, Affine, Scan, Source, Volume, is_valid_affine

Header = nib.Nifti1Header  # the header class of NIfTI-2 derives from it

_NIFTI1_BYTES, _NIFTI1_MAGIC_OFFSET = 348, 344
_NIFTI2_BYTES = 540
# Voxel sizes of sform and pixdim agree within this fraction.
MAX_SIZE_ERROR = 0.01
# The voxels start here if there are no extensions: behind the header and a flag of four bytes.
_NIFTI1_VOXELS, _NIFTI2_VOXELS = 352, 544
_DESCRIPTION = slice(148, 228)
_MAX_AXES = 7
# Bits per voxel of each data type of Analyze 7.5.
_ANALYZE_BITS = {2: 8, 4: 16, 8: 32, 16: 32, 32: 64, 64: 64, 128: 24}
_NIFTI1_MAGIC = b"n+1\0"
_NIFTI2_MAGIC = b"n+2\0\r\n\x1a\n"
_PAIR_MAGICS = (b"ni1\0", b"ni2\0")
# Suffixes of the files of a pair in lower case, each also with .gz behind it.
HEADER_SUFFIX, IMAGE_SUFFIX = ".hdr", ".img"
_INCOMPLETE_PAIR = "The image file of the pair ends before its last voxel."
_MM_PER_UNIT = {"mm": 1.0, "meter": 1000.0, "micron": 0.001}
# No scan is shorter or longer along its longest axis. Outside this range the unit is taken for wrong.
SMALLEST_IMAGE_MM, LARGEST_IMAGE_MM = 1.0, 1000.0
# A sform and a qform that differ by less than this are the same geometry, written twice.
_SAME_POSITION_MM = 0.5


def matches(head: bytes) -> bool:
    """Return True if the first bytes are those of a NIfTI file that contains its voxels.

    A NIfTI-1 file that ends inside its header is a truncated NIfTI file, not another format.

    Raises
    ------
    NotAnImageFormat
        If the bytes are the header of a NIfTI or Analyze pair, whose voxels are in another file.
    """
    if is_pair_header(head):
        raise NotAnImageFormat(
            "The file is the header of a pair (.hdr and .img) and does not contain the voxels.",
            expected="one NIfTI file with header and voxels (.nii, .nii.gz), or both files of the pair.",
            advice="Save the pair as one .nii file, or zip both files together.",
        )
    sizes = _stated_sizes(head)
    if _NIFTI1_BYTES in sizes:
        magic = head[_NIFTI1_MAGIC_OFFSET:_NIFTI1_BYTES]
        return magic == _NIFTI1_MAGIC or len(head) < _NIFTI1_BYTES
    return _NIFTI2_BYTES in sizes and _NIFTI2_MAGIC.startswith(head[4:12])


def is_pair_header(head: bytes) -> bool:
    """Return True if the first bytes are the header of a NIfTI or Analyze pair, whose voxels are in another file."""
    if is_nifti2(head):
        return head[4:8] in _PAIR_MAGICS
    is_nifti1 = _NIFTI1_BYTES in _stated_sizes(head)
    return is_analyze(head) or (is_nifti1 and head[_NIFTI1_MAGIC_OFFSET:_NIFTI1_BYTES] in _PAIR_MAGICS)


def is_result(head: bytes) -> bool:
    """Return True if the first bytes are those of an image that Counterpart wrote as a result."""
    description = head[_DESCRIPTION].rstrip(b"\0")
    return description.startswith(RESULT_PREFIX.encode()) and description.endswith(RESULT_SUFFIX.encode())


def is_nifti2(head: bytes) -> bool:
    """Return True if the first bytes state the size of a header of NIfTI-2."""
    return _NIFTI2_BYTES in _stated_sizes(head)


def is_analyze(head: bytes) -> bool:
    """Return True if the first bytes are a header of Analyze 7.5, which has the size of NIfTI-1 and no magic number."""
    if len(head) < _NIFTI1_BYTES or _NIFTI1_BYTES not in _stated_sizes(head):
        return False
    if head[_NIFTI1_MAGIC_OFFSET:].startswith((_NIFTI1_MAGIC, *_PAIR_MAGICS)):
        return False
    analyze = nib.AnalyzeHeader(head[:_NIFTI1_BYTES], check=False)
    # Some writers leave the letter "r" out.
    axes, bits = int(analyze["dim"][0]), _ANALYZE_BITS.get(int(analyze["datatype"]))
    is_plausible = 1 <= axes <= _MAX_AXES and int(analyze["bitpix"]) == bits
    return bool(analyze["regular"].item() == b"r" or is_plausible)


def _stated_sizes(head: bytes) -> set[int]:
    """Return the size of the header that it states, in both byte orders."""
    return {int.from_bytes(head[:4], order) for order in ("little", "big")}


def count_bytes(head: bytes, limits: Limits) -> int:
    """Return the number of bytes up to the last voxel: see `app.ingest.volume_file.VolumeFormat`."""
    return _count_bytes(_parse_header(head)[0], limits)


def _parse_header(head: bytes) -> tuple[Header, list[str]]:
    """Return the header with its repairable faults repaired, and a note about each repair."""
    header_class = nib.Nifti2Header if is_nifti2(head) else nib.Nifti1Header
    size = int(header_class.template_dtype.itemsize)
    if len(head) < size:
        raise truncated(f"The file ends inside its header, after {len(head)} bytes.")
    try:
        header = header_class(head[:size], check=True)  # type: ignore[no-untyped-call]
    except HEADER_ERRORS:
        raise invalid_header() from None
    return header, [*_repair_lengths(header), *_repair_offset(header, head)]


def _repair_lengths(header: Header) -> list[str]:
    """Set each length of 0 behind the third axis to 1."""
    lengths = header["dim"]
    behind = slice(4, max(4, min(int(lengths[0]), 7) + 1))
    if (lengths[behind] != 0).all():
        return []
    lengths[behind][lengths[behind] == 0] = 1
    return ["The header states a length of 0 behind the third axis. It is read as 1."]


def _repair_offset(header: Header, head: bytes) -> list[str]:
    """Let the voxels of a single file begin behind its header if the header states the position 0."""
    if header["vox_offset"] != 0:
        return []
    flag = head[_NIFTI1_BYTES : _NIFTI1_BYTES + 4]
    if isinstance(header, nib.Nifti2Header) or any(flag):
        raise InvalidHeader(
            "The header states that the voxels begin inside the header (vox_offset 0).",
            expected="the position behind the header and its extensions.",
            advice="Convert the original again with a current tool.",
        )
    header["vox_offset"] = _NIFTI1_VOXELS
    note = (
        "The header states that the voxels begin inside the header (vox_offset 0). They are read from byte "
        f"{_NIFTI1_VOXELS}, where the header ends."
    )
    return [note]


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
    header, notes = _parse_header(file.read(HEAD_BYTES))
    expected = _count_bytes(header, limits)
    check_complete(file, expected)
    try:
        scaling = header.get_slope_inter()
        file.seek(header.get_data_offset())
        array = read_voxels(file, header.get_data_shape(), header.get_data_dtype(), scaling)
    except HEADER_ERRORS:
        raise invalid_header() from None
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[..., np.newaxis]  # (X, Y) -> (X, Y, 1)
    affine, code = _affine_mm(header, array.shape, notes)
    source = Source(
        format="nifti",
        looks_hounsfield=looks_hounsfield(array),
        sform_code=code,
        notes=tuple(notes),
        warnings=tuple(_find_surplus(file, expected)),
    )
    return Scan(Volume(array, affine), source)


def _find_surplus(file: BinaryIO, expected: int) -> Iterator[str]:
    """Yield a warning if bytes follow the voxels: the header may announce fewer slices than the file has."""
    if file.seek(0, io.SEEK_END) > expected:
        yield (
            f"More data follows the {expected} bytes that the header of the file announces. It was left out. If it is "
            "a part of the scan, the scan is truncated."
        )


# ---- position ----------------------------------------------------------------------------------


def _affine_mm(header: Header, shape: tuple[int, ...], notes: list[str]) -> tuple[Affine, int]:
    """Return the affine from voxel indices to RAS+ mm and the code of its space. Notes are added to `notes`.

    Raises
    ------
    InvalidGeometry
        No scan has that size in the stated unit.
    """
    unit = _read_unit(header)
    affine, code = _choose_affine(header, shape, _MM_PER_UNIT.get(unit, 1.0), notes)
    if unit == "unknown":
        notes.append("The file states no unit of length. Millimetres are assumed.")
    elif unit != "mm":
        notes.append(f"The unit of length of the file is {unit}. Lengths are converted to millimetres.")
    if unit != "mm":
        _check_unit(affine, shape, unit)
    return affine, code


def _read_unit(header: Header) -> str:
    try:
        return str(header.get_xyzt_units()[0])
    except KeyError:
        return "unknown"


def _choose_affine(header: Header, shape: tuple[int, ...], unit_mm: float, notes: list[str]) -> tuple[Affine, int]:
    """Return the affine and the code of its space: the sform, unless only the qform is valid."""
    sform, qform, base = (
        _affine_of(get, unit_mm) for get in (header.get_sform, header.get_qform, header.get_base_affine)
    )
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    if not sform_code and not qform_code:
        notes.append(
            "The file states no position in space (sform and qform code 0). NIfTI's default position is used: the "
            "slices are taken for axial, and left and right may be exchanged."
        )
        return base, 0
    if sform_code and qform_code:
        if is_valid_affine(qform) and not is_valid_affine(sform):
            notes.append("The sform of the file is not an invertible matrix. The qform is used.")
            return qform, qform_code
        if is_valid_affine(qform) and (distance := _max_distance(sform - qform, shape)) > _SAME_POSITION_MM:
            notes.append(f"The sform and the qform of the file differ by up to {distance:.1f} mm. The sform is used.")
        elif not is_valid_affine(qform):
            notes.append("The qform of the file is not an invertible matrix. The sform is used.")
    if sform_code and not qform_code:
        notes += _compare_voxel_sizes(sform, np.abs(header["pixdim"][1:4].astype(np.float64)) * unit_mm)
    return (sform, sform_code) if sform_code else (qform, qform_code)


def _compare_voxel_sizes(sform: Affine, sizes: npt.NDArray[np.float64]) -> list[str]:
    """Return a note if the sform has other voxel sizes than the header states (pixdim)."""
    own = np.linalg.norm(sform[:3, : len(sizes)], axis=0)
    if np.allclose(own, sizes, rtol=MAX_SIZE_ERROR, atol=0):
        return []
    stated, used = (" x ".join(f"{size:.3g}" for size in values) for values in (sizes, own))
    return [f"The header states voxels of {stated} mm (pixdim), the sform {used} mm. The sform is used."]


def _affine_of(get: Callable[[], Affine], unit_mm: float) -> Affine:
    """Return one of the affines of a header in mm, (4, 4). If nibabel cannot compute it, it is NaN."""
    try:
        affine = np.array(get(), dtype=np.float64)
    except HEADER_ERRORS:
        return np.full((4, 4), np.nan)
    affine[:3] *= unit_mm
    return affine


def _max_distance(difference: Affine, shape: tuple[int, ...]) -> float:
    """Return the largest distance in mm between two positions of a corner, from the difference of two affines."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    shift = difference[:3, :3] @ corners + difference[:3, 3:]
    return float(np.linalg.norm(shift, axis=0).max())


def _check_unit(affine: Affine, shape: tuple[int, ...], unit: str) -> None:
    """Raise `InvalidGeometry` if the image is smaller or larger than any scan, so that its unit must be wrong."""
    longest = float((np.linalg.norm(affine[:3, :3], axis=0) * shape).max())
    if SMALLEST_IMAGE_MM <= longest <= LARGEST_IMAGE_MM or not np.isfinite(longest):
        return
    found = f"The unit of length of the file is {unit}" if unit != "unknown" else "The file states no unit of length"
    size = "smaller than a millimetre" if longest < SMALLEST_IMAGE_MM else "longer than a metre"
    raise InvalidGeometry(
        f"{found}{', and in millimetres' if unit == 'unknown' else '. In this unit'} the image is {size}.",
        expected="a unit that fits the voxel sizes and the positions.",
        advice="Correct the unit (xyzt_units) of the file. Most files are in millimetres.",
    )


# ---- pairs of a header and an image ------------------------------------------------------------


def split_name(name: str) -> tuple[str, str]:
    """Split a file name into the part that both files of a pair share, and the suffix without .gz, in lower case."""
    plain = name[:-3] if name.lower().endswith(".gz") else name
    stem, dot, suffix = plain.rpartition(".")
    return stem, (dot + suffix).lower()


def find_image(path: Path) -> Path | None:
    """Return the image file beside a file if that is the header of a pair, else None."""
    return _find_beside(path, IMAGE_SUFFIX) if _is_header(path) else None


def find_header(path: Path) -> Path | None:
    """Return the header beside a file that is the image of a pair, else None."""
    if split_name(path.name)[1] != IMAGE_SUFFIX:
        return None
    header = _find_beside(path, HEADER_SUFFIX)
    return header if header and _is_header(header) else None


def join_pair(header: Path, image: Path, scratch: Path, limits: Limits) -> Path:
    """Write one NIfTI file with the header and the voxels of a pair.

    Parameters
    ----------
    header, image : Path
        Files of the pair, plain or gzipped.
    scratch : Path
        Folder for the new file. It is created if it is missing.
    limits : Limits

    Raises
    ------
    TruncatedFile
        If the image ends before its last voxel.
    TooManyVoxels
        If the header states a size beyond `limits`. It is checked before anything is written.
    InvalidHeader, NotAVolume, UnsupportedPixels
        If the header is not that of one grey volume.
    """
    try:
        head, offset = _single_file_head(read_inflated_head(header))
    except HEADER_ERRORS:
        raise invalid_header() from None
    remaining = count_bytes(head, limits) - len(head)
    if offset > limits.max_inflated_bytes:
        raise truncated(_INCOMPLETE_PAIR)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=scratch, prefix="pair-", delete=False) as joined:
        joined.write(head)
        try:
            with _open(image) as source:
                source.seek(offset)
                while remaining > 0 and (chunk := source.read(min(remaining, CHUNK_BYTES))):
                    joined.write(chunk)
                    remaining -= len(chunk)
        except (igzip.BadGzipFile, EOFError, InflateError):
            raise truncated("The gzip stream is incomplete or damaged.") from None
    if remaining:
        raise truncated(_INCOMPLETE_PAIR)
    return Path(joined.name)


def _single_file_head(head: bytes) -> tuple[bytes, int]:
    """Return the header of a single file with the same voxels, and where they begin in the image file."""
    if is_nifti2(head):
        second = nib.Nifti2Header(head[: nib.Nifti2Header.template_dtype.itemsize], check=False)
        offset = int(second["vox_offset"])
        second["magic"], second["vox_offset"] = _NIFTI2_MAGIC, _NIFTI2_VOXELS
        return second.binaryblock + bytes(4), max(0, offset)
    size = nib.Nifti1Header.template_dtype.itemsize
    if is_analyze(head):
        first, offset = _from_analyze(nib.AnalyzeHeader(head[:size], check=True))
    else:
        first = nib.Nifti1Header(head[:size], check=False)
        offset = int(first["vox_offset"])
    first["magic"], first["vox_offset"] = _NIFTI1_MAGIC, _NIFTI1_VOXELS
    return first.binaryblock + bytes(4), max(0, offset)


def _from_analyze(analyze: nib.AnalyzeHeader) -> tuple[nib.Nifti1Header, int]:
    """Return the NIfTI header for an Analyze header, and where its voxels begin. Analyze states no position."""
    header = nib.Nifti1Header(endianness=analyze.endianness)
    header.set_data_dtype(analyze.get_data_dtype())
    header["dim"], header["pixdim"][1:] = analyze["dim"], np.abs(analyze["pixdim"][1:])
    # SPM stores the slope of the values in this field, which Analyze does not use.
    slope = float(analyze["funused1"])
    header["scl_slope"] = slope if np.isfinite(slope) and slope > 0 else 0
    return header, int(analyze["vox_offset"])


def _is_header(path: Path) -> bool:
    return split_name(path.name)[1] == HEADER_SUFFIX and is_pair_header(read_inflated_head(path))


def _find_beside(path: Path, suffix: str) -> Path | None:
    stem = split_name(path.name)[0]
    # Names are tried, not listed, because an upload can hold thousands of pairs.
    names = (f"{stem}{cased}{packed}" for cased in (suffix, suffix.upper()) for packed in ("", ".gz", ".GZ"))
    return next((beside for name in names if (beside := path.with_name(name)).is_file()), None)


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        is_gzipped = file.read(len(GZIP_SIGNATURE)) == GZIP_SIGNATURE
    return cast("BinaryIO", igzip.open(path)) if is_gzipped else path.open("rb")
