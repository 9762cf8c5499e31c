"""A head CT as a scanner of today sends it: 512 x 512 pixels in 200 slices, one DICOM file each, in one zip."""

from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to

from app.ingest.reader import read_scan
from app.volume import Volume
from benchmarks.missing import Missing
from tests.support.dicom import Series, write_series, zip_files
from training.archives import unpack

HEAD = Path("dicom", "ge_ct_head_human_28.tar.xz")
SHAPE = (512, 512, 200)
AIR_HU = -1024.0
SEED = 0
# Of a scanner: without it, interpolated slices compress better than real ones.
NOISE_HU = 4.0
CT = Series(modality="CT", plane=None, rescale=(1.0, AIR_HU), description="HEAD AXIAL")


def make_volume(head: Volume, shape: tuple[int, int, int] = SHAPE) -> Volume:
    """A head on another grid over the same space, axes to the left, the back and the top, in whole units."""
    image = nib.Nifti1Image(head.array, head.affine)
    corners = nib.affines.apply_affine(head.affine, list(product(*((0, n - 1) for n in head.shape))))
    low, high = corners.min(axis=0), corners.max(axis=0)
    steps = (high - low) / (np.array(shape) - 1)
    affine = np.diag([-steps[0], -steps[1], steps[2], 1.0])
    affine[:3, 3] = (high[0], high[1], low[2])
    there = resample_from_to(image, (shape, affine), order=1, cval=AIR_HU)
    noise = np.random.default_rng(SEED).normal(0, NOISE_HU, shape)
    return Volume(np.clip(np.round(np.asarray(there.dataobj) + noise), AIR_HU, 3071), affine)


def make_series(data: Path, folder: Path) -> Path:
    """The zip to upload, made of a real head whose tilt is resampled away.

    Parameters
    ----------
    data : Path
        Root of the data.
    folder : Path
        Where it is written.

    Raises
    ------
    Missing
        The head is not among the data.
    """
    if not (data / HEAD).is_file():
        raise Missing(f"the CT series is made of {HEAD}, which is not among the data: set COUNTERPART_DATA")
    with TemporaryDirectory() as made:
        unpack(data / HEAD, Path(made) / "head")
        head = read_scan(Path(made) / "head", scratch=Path(made), geometry="resample").volume
        return zip_files(folder / "ct.zip", write_series(Path(made) / "series", make_volume(head), CT))
