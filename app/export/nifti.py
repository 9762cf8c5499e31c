"""Results as NIfTI on the scan's own grid, the same bytes every time."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip

# qform holds a rotation and voxel sizes only; where a sheared affine differs from it by more than
# this, the qform would place the voxels elsewhere and is switched off.
QFORM_TOLERANCE_MM = 1e-3
UNKNOWN_CODE = 0
# Of igzip's 0 to 3: nine times as fast as zlib's 4, and a tenth larger.
COMPRESSION_LEVEL = 1


def write_nifti(
    path: Path, array: npt.NDArray[Any], affine: npt.NDArray[np.float64], code: int, description: str
) -> None:
    """Write one volume as .nii.gz.

    Parameters
    ----------
    path : Path
        Target; the file appears whole or not at all.
    array : (X, Y, Z) ndarray
        uint8 for a mask, float32 for a map.
    affine : (4, 4) ndarray
        Voxel indices to RAS+ millimetres; written as sform exactly.
    code : int
        NIfTI's code of that space.
    description : str
        At most 79 characters; no patient data.
    """
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description[:79].encode()
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code, strip_shears=True)
    if np.abs(image.get_qform() - affine).max() > QFORM_TOLERANCE_MM:
        image.set_qform(None, code=UNKNOWN_CODE)
        image.header["pixdim"][1:4] = nib.affines.voxel_sizes(affine)
    temporary = path.with_name(path.name + ".part")
    # No file name and no time in the gzip header: the same result gives the same bytes.
    with temporary.open("wb") as raw, igzip.IGzipFile("", "wb", COMPRESSION_LEVEL, raw, mtime=0) as packed:
        image.to_stream(packed)
    temporary.replace(path)
