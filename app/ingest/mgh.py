"""FreeSurfer's MGH (and gzipped, MGZ) -> a scan. Geometry by nibabel."""

import io
import math
from typing import BinaryIO, cast

import numpy as np
from nibabel.affines import from_matvec
from nibabel.fileholders import FileHolder
from nibabel.freesurfer.mghformat import MGHError, MGHHeader, MGHImage

from app.ingest.announced import HEADER_FAULTS, check_kind, check_present, check_size, truncated, unreadable_header
from app.ingest.limits import Limits
from app.ingest.hounsfield import looks_hounsfield
from app.volume import Affine, Scan, Source, Volume

# The header, and the zeros up to the first voxel.
DATA_OFFSET = 284
# Whether the header has a place; nibabel fills it in where there is none, and then says yes.
GOOD_RAS = slice(28, 30)
_FAULTS = (*HEADER_FAULTS, MGHError)


def announced_bytes(head: bytes, limits: Limits) -> int:
    """Bytes from the file's start to its last voxel, before anything of that size is allocated or written.

    Raises
    ------
    NotAVolume
        Several frames.
    TooManyVoxels
        More than the limits.
    TruncatedFile, InvalidHeader
        The header is cut short, or cannot be.
    """
    if len(head) < DATA_OFFSET:
        raise truncated(f"The file ends after {len(head)} bytes, inside its header.")
    try:
        header = MGHHeader(head[:DATA_OFFSET])
        shape, dtype = header.get_data_shape(), np.dtype(header.get_data_dtype())
    except _FAULTS:
        raise unreadable_header() from None
    check_kind(dtype, shape)
    count = math.prod(int(n) for n in shape)
    size = DATA_OFFSET + count * int(dtype.itemsize)
    check_size(count, size, limits)
    return size


def load(file: BinaryIO, limits: Limits) -> Scan:
    """Read an MGH file, from its start.

    Raises
    ------
    CounterpartError
        What `app.ingest.single.read` raises.
    """
    file.seek(0)
    head = file.read(DATA_OFFSET)
    announced = announced_bytes(head, limits)
    check_present(file, announced)
    try:
        image = MGHImage.from_file_map({"image": FileHolder(fileobj=cast("io.IOBase", file))}, mmap=False)
        array = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (*_FAULTS, OSError):
        raise unreadable_header() from None
    placed = any(head[GOOD_RAS])
    default = "FreeSurfer's coronal default was taken, and left may be right."
    note = f"The file states no position in space (goodRASFlag 0): {default}"
    notes = () if placed else (note,)
    source = Source(format="mgh", looks_hounsfield=looks_hounsfield(array), sform_code=int(placed), notes=notes)
    affine = np.asarray(image.affine, dtype=np.float64)
    return Scan(Volume(array, affine if placed else _coronal(array.shape)), source)


def _coronal(shape: tuple[int, ...]) -> Affine:
    """FreeSurfer's place for a volume without one: one millimetre, left, inferior, anterior, centred.

    nibabel has the same cosines with rows and columns exchanged, which turns the head upside down.
    """
    cosines = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    return np.asarray(from_matvec(cosines, -cosines @ np.array(shape[:3]) / 2), dtype=np.float64)
