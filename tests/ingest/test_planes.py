"""Planes that are empty or have another scale than their neighbours."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.errors import InvalidVoxels
from app.volume import FloatArray
from tests.ingest.conftest import Read
from tests.support.dicom import make_datasets, save
from tests.support.phantom import brain


def write(path: Path, array: FloatArray) -> Path:
    nib.save(nib.Nifti1Image(array, brain().affine), path)
    return path


@pytest.mark.parametrize("planes", [range(20, 21), range(20, 25), range(8, 40, 2)], ids=["one", "five", "every other"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_empty_planes_inside_a_scan_are_refused(tmp_path: Path, read_scan: Read, axis: int, planes: range) -> None:
    array = brain().array.copy()
    np.moveaxis(array, axis, 0)[list(planes)] = 0
    expected = rf" {len(planes)} in all: plane {planes[0] + 1} .*of .* axis {axis + 1}"
    with pytest.raises(InvalidVoxels, match=expected) as refused:
        read_scan(write(tmp_path / "scan.nii", array))
    assert "every slice arrived" in refused.value.advice


@pytest.mark.parametrize("factor", [5.0, 0.2, 1e30])
def test_planes_of_another_scale_are_warned_of(tmp_path: Path, read_scan: Read, factor: float) -> None:
    array = brain().array.astype(np.float64)
    array[:, :, 20:22] *= factor
    scan = read_scan(write(tmp_path / "scan.nii", array.astype(np.float32)))
    (warning,) = scan.source.warnings
    assert warning.startswith("A part of the scan is at least 3 times as bright or dark")
    assert "plane 21 to 22 of 48 along axis 3" in warning


def test_a_dicom_slice_with_another_rescale_is_warned_of(tmp_path: Path, read_scan: Read) -> None:
    slices = make_datasets(brain())
    slices[20].RescaleSlope, slices[20].RescaleIntercept = "5", "0"
    save(tmp_path / "s", slices)
    (warning,) = read_scan(tmp_path / "s").source.warnings
    assert "21 of 48 along axis 3" in warning


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_a_head_and_its_ends_are_accepted(tmp_path: Path, read_scan: Read, scale: float) -> None:
    array = brain().array * scale
    array[:, :, :6] = array[:, :, -6:] = array.flat[0]
    array[5:8, 5:8, 2] = 3 * array.max()  # an island outside the head
    assert read_scan(write(tmp_path / "scan.nii", array.astype(np.float32))).source.warnings == ()
