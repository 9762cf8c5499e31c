"""Head CT series of a size that is usual today: 200 DICOM files of 512 x 512 pixels in one zip archive."""

from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to

from app.ingest.reader import read_scan
from app.volume import Volume
from tests.support.dicom import Series, write_series, zip_files
from training.data import unpack_archive

HEAD_ARCHIVE = Path("dicom", "ge_ct_head_human_28.tar.xz")
SHAPE = (512, 512, 200)
AIR_HU = -1024.0
SEED = 0
# Interpolated slices without noise would compress better than real ones.
NOISE_HU = 4.0
CT = Series(modality="CT", plane=None, rescale=(1.0, AIR_HU), description="HEAD AXIAL")


class MissingDataError(Exception):
    """Data or a bundle that a part of the benchmark needs is missing. The other parts are measured."""


def make_volume(head: Volume, shape: tuple[int, int, int] = SHAPE) -> Volume:
    """Resample a head to a grid of another shape over the same space, with axes LPS+ and integer HU."""
    image = nib.Nifti1Image(head.array, head.affine)
    corners = nib.affines.apply_affine(head.affine, list(product(*((0, n - 1) for n in head.shape))))
    low, high = corners.min(axis=0), corners.max(axis=0)
    spacing = (high - low) / (np.array(shape) - 1)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = (high[0], high[1], low[2])
    resampled = resample_from_to(image, (shape, affine), order=1, cval=AIR_HU)
    noise = np.random.default_rng(SEED).normal(0, NOISE_HU, shape)
    return Volume(np.clip(np.round(np.asarray(resampled.dataobj) + noise), AIR_HU, 3071), affine)


def make_series(data: Path, folder: Path) -> Path:
    """Write the zip archive to upload, made from a real head whose tilt is resampled away, and return its path.

    Parameters
    ----------
    data : Path
        Folder of the real scans.
    folder : Path
        Folder of the archive.

    Raises
    ------
    MissingDataError
        The head is not in the data folder.
    """
    if not (data / HEAD_ARCHIVE).is_file():
        raise MissingDataError(f"{HEAD_ARCHIVE} is missing: set COUNTERPART_DATA to the folder of the data")
    with TemporaryDirectory() as made:
        unpack_archive(data / HEAD_ARCHIVE, Path(made) / "head")
        head = read_scan(Path(made) / "head", scratch=Path(made), geometry="resample").volume
        return zip_files(folder / "ct.zip", write_series(Path(made) / "series", make_volume(head), CT))
