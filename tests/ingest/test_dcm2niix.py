"""Our volumes against those of dcm2niix (Debian's package of that name), voxel for voxel, in position."""

import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.volume import Volume
from tests.ingest.conftest import Read, placed
from tests.support.dicom import Series, write_series

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


def converted(source: Path, out: Path) -> nib.Nifti1Image:
    """The one image that dcm2niix makes of it."""
    out.mkdir()
    folder = source
    if source.is_file():
        folder = out / "one"
        folder.mkdir()
        shutil.copy(source, folder)
    # -p n: the standard's rescale, not Philips' private one.
    options = ["-b", "n", "-z", "n", "-p", "n", "-o", str(out)]
    subprocess.run([str(DCM2NIIX), *options, str(folder)], check=True, capture_output=True)
    (found,) = out.glob("*.nii")
    image = nib.load(found)
    assert isinstance(image, nib.Nifti1Image)
    return image


def assert_same_voxels_in_the_same_places(ours: Volume, theirs: nib.Nifti1Image) -> None:
    to_theirs = np.linalg.inv(theirs.affine) @ ours.affine
    index = np.indices(ours.shape).reshape(3, -1)
    exact = to_theirs[:3, :3] @ index + to_theirs[:3, 3:]
    there = np.rint(exact).astype(int)
    assert np.abs(exact - there).max() < 0.02  # of a voxel: theirs is stored in float32
    assert sorted(theirs.shape) == sorted(ours.shape)
    values = theirs.get_fdata(dtype=np.float32)[tuple(there)].reshape(ours.shape)
    np.testing.assert_allclose(ours.array, values, rtol=1e-5, atol=1e-3)


@pytest.mark.data
@pytest.mark.parametrize("folder", REAL.values(), ids=REAL)
def test_real_series(archives: Path, tmp_path: Path, read_scan: Read, folder: str) -> None:
    scan = read_scan(archives / folder)
    assert_same_voxels_in_the_same_places(scan.volume, converted(archives / folder, tmp_path / "out"))


@pytest.mark.parametrize("plane", ["axial", "sagittal", "coronal"])
def test_an_oblique_phantom_in_each_plane(tmp_path: Path, read_scan: Read, volume: Volume, plane: str) -> None:
    turned = Volume(volume.array, placed((0.9, 1.1, 2.0), (0.2, -0.35, 0.5)))
    write_series(tmp_path / "s", turned, Series(plane=plane))  # type: ignore[arg-type]
    scan = read_scan(tmp_path / "s")
    assert_same_voxels_in_the_same_places(scan.volume, converted(tmp_path / "s", tmp_path / "out"))
