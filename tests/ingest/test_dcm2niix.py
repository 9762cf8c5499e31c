"""Comparison with dcm2niix, voxel for voxel and in position. Debian has a package of that name."""

import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.dicom import Series, write_series
from tests.support.geometry import OBLIQUE, SPACING, make_affine

DCM2NIIX = shutil.which("dcm2niix")
pytestmark = pytest.mark.skipif(DCM2NIIX is None, reason="dcm2niix is not installed")

REAL = {
    "uih": "uih/uih_umr770_t1_sag",
    "studyforrest": "studyforrest/studyforrest_t1",
    "philips enhanced": "dicom2nifti/dicom2nifti/philips_enhanced/anatomical/001",
    "hyperfine enhanced": "dicom2nifti/dicom2nifti/hyperfine/anatomical/001",
    "siemens, rle": "dicom2nifti/dicom2nifti/generic/compressed_rle/001",
    "mosaic": "siemens/transfer_syntax/1.dcm",
    "mosaic, jpeg lossless": "siemens/transfer_syntax/5.dcm",
}


def convert(source: Path, out: Path) -> nib.Nifti1Image:
    """Convert a series or file with dcm2niix."""
    out.mkdir()
    folder = source
    if source.is_file():
        folder = out / "one"
        folder.mkdir()
        shutil.copy(source, folder)
    # -p n: use the rescale of the standard, not the private one of Philips.
    options = ["-b", "n", "-z", "n", "-p", "n", "-o", str(out)]
    subprocess.run([str(DCM2NIIX), *options, str(folder)], check=True, capture_output=True)
    (found,) = out.glob("*.nii")
    image = nib.load(found)
    assert isinstance(image, nib.Nifti1Image)
    return image


def assert_same_voxels(ours: Volume, other: nib.Nifti1Image) -> None:
    to_other = np.linalg.inv(other.affine) @ ours.affine
    index = np.indices(ours.shape).reshape(3, -1)
    exact = to_other[:3, :3] @ index + to_other[:3, 3:]
    rounded = np.rint(exact).astype(int)
    assert np.abs(exact - rounded).max() < 0.02  # voxels: dcm2niix stores the affine in float32
    assert sorted(other.shape) == sorted(ours.shape)
    values = other.get_fdata(dtype=np.float32)[tuple(rounded)].reshape(ours.shape)
    np.testing.assert_allclose(ours.array, values, rtol=1e-5, atol=1e-3)


@pytest.mark.data
@pytest.mark.parametrize("folder", REAL.values(), ids=REAL)
def test_real_series_are_the_same(archives: Path, tmp_path: Path, read_scan: Read, folder: str) -> None:
    scan = read_scan(archives / folder)
    assert_same_voxels(scan.volume, convert(archives / folder, tmp_path / "out"))


@pytest.mark.parametrize("plane", ["axial", "sagittal", "coronal"])
def test_an_oblique_phantom_is_the_same_in_each_plane(
    tmp_path: Path, read_scan: Read, volume: Volume, plane: str
) -> None:
    rotated = Volume(volume.array, make_affine(SPACING, OBLIQUE))
    write_series(tmp_path / "s", rotated, Series(plane=plane))  # type: ignore[arg-type]
    scan = read_scan(tmp_path / "s")
    assert_same_voxels(scan.volume, convert(tmp_path / "s", tmp_path / "out"))
