"""Every voxel of a NIfTI file has the position that its affine states."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel import affines, orientations

from app.export.outputs import write_nifti
from app.volume import Volume
from tests.support.geometry import ANGLES, LAYOUTS, make_layout


def asymmetric_mask(volume: Volume) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(volume.array > volume.array.max() - 40, dtype=np.uint8)


def centroid(array: Any, affine: Any) -> Any:
    return affines.apply_affine(affine, np.argwhere(array)).mean(axis=0)


def write_and_load(path: Path, mask: Any, affine: Any) -> nib.Nifti1Image:
    write_nifti(path, mask, affine, 1, "a mask")
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return image


@pytest.mark.parametrize("angles", ANGLES.values(), ids=ANGLES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "".join(orientations.ornt2axcodes(layout)))
def test_mask_keeps_its_position_in_every_axis_layout(
    tmp_path: Path, layout: Any, angles: tuple[float, float, float]
) -> None:
    volume = make_layout(layout, angles)
    mask = asymmetric_mask(volume)
    image = write_and_load(tmp_path / "mask.nii.gz", mask, volume.affine)
    for affine, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        assert code == 1
        # sform and quaternion are float32
        np.testing.assert_allclose(
            centroid(np.asarray(image.dataobj), affine), centroid(mask, volume.affine), atol=1e-4
        )


def test_sheared_affine_has_no_qform(tmp_path: Path) -> None:
    volume = make_layout(LAYOUTS[0], ANGLES["oblique"])
    affine = volume.affine.copy()
    affine[:3, 2] += 0.3 * affine[:3, 0]
    mask = asymmetric_mask(volume)
    image = write_and_load(tmp_path / "mask.nii.gz", mask, affine)
    sform, code = image.get_sform(coded=True)
    assert code == 1
    np.testing.assert_allclose(centroid(np.asarray(image.dataobj), sform), centroid(mask, affine), atol=1e-4)
    assert image.get_qform(coded=True)[1] == 0
