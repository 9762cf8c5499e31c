"""Single voxels whose sign or scale makes no sense."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.dicom import write_series
from tests.support.phantom import brain


def write(path: Path, volume: Volume) -> Path:
    image = nib.Nifti1Image(volume.array, volume.affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
    return path


@pytest.mark.parametrize("value", [1e30, -1e30, 65535.0, -32768.0])
@pytest.mark.parametrize("at", [(26, 32, 24), (0, 0, 0), (51, 63, 47)])
def test_a_voxel_beyond_all_others_is_repaired_with_a_note(
    tmp_path: Path, read_scan: Read, value: float, at: tuple[int, int, int]
) -> None:
    healthy = brain()
    volume = Volume(healthy.array.copy(), healthy.affine)
    volume.array[at] = value
    scan = read_scan(write(tmp_path / "scan.nii.gz", volume))
    np.testing.assert_allclose(scan.volume.array, healthy.array, rtol=0, atol=60)
    changed = scan.volume.array != healthy.array
    assert not changed.any() or [tuple(i) for i in np.argwhere(changed)] == [at]
    (note,) = scan.source.notes
    assert "1 of 159744 voxels" in note


@pytest.mark.parametrize("value", [3000.0, -3000.0])
def test_a_bright_voxel_is_kept(tmp_path: Path, read_scan: Read, value: float) -> None:
    volume = Volume(brain().array.copy(), brain().affine)
    volume.array[26, 32, 24] = value
    scan = read_scan(write(tmp_path / "scan.nii.gz", volume))
    np.testing.assert_array_equal(scan.volume.array, volume.array)
    assert scan.source.notes == ()


def test_many_outliers_are_no_single_faults(tmp_path: Path, read_scan: Read) -> None:
    volume = Volume(brain().array.copy(), brain().affine)
    volume.array[0, 0, :10] = -32768
    scan = read_scan(write(tmp_path / "scan.nii.gz", volume))
    np.testing.assert_array_equal(scan.volume.array, volume.array)


def test_a_series_is_repaired_too(tmp_path: Path, read_scan: Read) -> None:
    volume = Volume(brain().array.copy(), brain().affine)
    volume.array[3, 3, 3] = 32767
    write_series(tmp_path / "series", volume)
    scan = read_scan(tmp_path / "series")
    assert scan.volume.array.max() < 2000
    assert len(scan.source.notes) == 1
