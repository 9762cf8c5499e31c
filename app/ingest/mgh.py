"""Reader for FreeSurfer's MGH files (gzipped: MGZ). nibabel derives the geometry."""

import math
import struct
from typing import BinaryIO

import numpy as np
from nibabel.affines import from_matvec
from nibabel.freesurfer.mghformat import MGHError, MGHHeader

from app.ingest.limits import Limits
from app.ingest.volume_file import (
    HEADER_ERRORS,
    check_complete,
    check_size,
    check_type,
    invalid_header,
    looks_hounsfield,
    read_voxels,
    truncated,
)
from app.volume import Affine, Scan, Source, Volume

# MGH has no magic number: its header starts with the version 1, four lengths and a data type, big endian.
_VERSION, _SIGNATURE_BYTES, _DATA_TYPES = 1, 24, (0, 1, 3, 4, 10)
# The voxels start here, behind the header and zeros.
_DATA_OFFSET = 284
# goodRASFlag. If it is 0, nibabel fills in a geometry and sets it to 1, so it is read before.
_GOOD_RAS = slice(28, 30)
_ERRORS = (*HEADER_ERRORS, MGHError)


def matches(head: bytes) -> bool:
    """Return True if the first bytes are those of an MGH file."""
    if len(head) < _SIGNATURE_BYTES:
        return False
    version, *lengths, data_type = struct.unpack(">6i", head[:_SIGNATURE_BYTES])
    return version == _VERSION and min(lengths) > 0 and data_type in _DATA_TYPES


def count_bytes(head: bytes, limits: Limits) -> int:
    """Return the number of bytes up to the last voxel: see `app.ingest.volume_file.VolumeFormat`."""
    if len(head) < _DATA_OFFSET:
        raise truncated(f"The file ends inside its header, after {len(head)} bytes.")
    try:
        header = MGHHeader(head[:_DATA_OFFSET])
        shape, dtype = header.get_data_shape(), np.dtype(header.get_data_dtype())
    except _ERRORS:
        raise invalid_header() from None
    check_type(dtype, shape)
    count = math.prod(int(n) for n in shape)
    size = _DATA_OFFSET + count * int(dtype.itemsize)
    check_size(count, size, limits)
    return size


def load(file: BinaryIO, limits: Limits) -> Scan:
    """Read an uncompressed MGH file: see `app.ingest.volume_file.VolumeFormat`."""
    file.seek(0)
    head = file.read(_DATA_OFFSET)
    check_complete(file, count_bytes(head, limits))
    try:
        header = MGHHeader(head)
        file.seek(_DATA_OFFSET)
        array = read_voxels(file, header.get_data_shape(), np.dtype(header.get_data_dtype()), (None, None))
    except _ERRORS:
        raise invalid_header() from None
    has_position = any(head[_GOOD_RAS])
    note = (
        "The file states no position in space (goodRASFlag 0). FreeSurfer's default coronal position is used: left "
        "and right may be exchanged."
    )
    source = Source(
        format="mgh",
        looks_hounsfield=looks_hounsfield(array),
        sform_code=int(has_position),
        notes=() if has_position else (note,),
    )
    affine = np.asarray(header.get_affine(), dtype=np.float64)
    return Scan(Volume(array, affine if has_position else _default_affine(array.shape)), source)


def _default_affine(shape: tuple[int, ...]) -> Affine:
    """Return FreeSurfer's affine for a volume without a position: 1 mm voxels, axes LIA, centred at the origin.

    nibabel's default has rows and columns of the direction cosines exchanged, which turns the head upside down.
    """
    cosines = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    return np.asarray(from_matvec(cosines, -cosines @ np.array(shape[:3]) / 2), dtype=np.float64)
