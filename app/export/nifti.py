"""Writer for NIfTI files on the scan's own grid. The same arguments give the same bytes."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip

from app.volume import FloatArray

# A qform has no shear. If a sheared affine differs from its qform by more than this, the qform would move voxels and is
# switched off.
QFORM_TOLERANCE_MM = 1e-3
UNKNOWN_CODE = 0
# igzip has levels 0 to 3. Level 1 is nine times as fast as zlib's level 4; its files are a tenth larger.
COMPRESSION_LEVEL = 1


def write_nifti(
    path: Path, array: npt.NDArray[Any], affine: npt.NDArray[np.float64], code: int, description: str
) -> None:
    """Write one volume as a gzip-compressed NIfTI file.

    Parameters
    ----------
    path : Path
        File to write.
    array : (X, Y, Z) ndarray
        For example uint8 for a mask, float32 for a map.
    affine : (4, 4) ndarray
        Voxel indices to RAS+ millimetres. The sform stores it exactly.
    code : int
        NIfTI code of that space (1 scanner, 2 aligned, 3 Talairach, 4 MNI).
    description : str
        At most 79 characters, without patient data.
    """
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description[:79].encode()
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code, strip_shears=True)
    if np.abs(image.get_qform() - affine).max() > QFORM_TOLERANCE_MM:
        image.set_qform(None, code=UNKNOWN_CODE)
        image.header["pixdim"][1:4] = nib.affines.voxel_sizes(affine)
    # Without a file name and a time in the gzip header, the same volume gives the same bytes.
    with path.open("wb") as raw, igzip.IGzipFile("", "wb", COMPRESSION_LEVEL, raw, mtime=0) as compressed:
        image.to_stream(compressed)


def to_smallest_type(array: FloatArray) -> FloatArray | npt.NDArray[np.int16]:
    """Return an array as int16 if that changes no value, else unchanged.

    Parameters
    ----------
    array : (X, Y, Z) ndarray of float32
        Finite values.
    """
    limits = np.iinfo(np.int16)
    whole = np.empty(array.shape, dtype=np.int16)
    for source, target in zip(array, whole, strict=True):  # plane by plane, to save memory
        if source.min() < limits.min or source.max() > limits.max:
            return array
        target[:] = source
        if (target != source).any():
            return array
    return whole
