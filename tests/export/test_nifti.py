"""A mask as NIfTI lies where it was found, by the file's own geometry."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel import affines, orientations

from app.export.nifti import write_nifti
from app.volume import Volume
from tests.support.geometry import ANGLES, LAYOUTS, make_layout


def mask_of(volume: Volume) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Some voxels on one side, in no symmetric form: the highest numbers."""
    return np.asarray(volume.array > volume.array.max() - 40, dtype=np.uint8)


def centroid(array: Any, affine: Any) -> Any:
    return affines.apply_affine(affine, np.argwhere(array)).mean(axis=0)


@pytest.mark.parametrize("angles", ANGLES.values(), ids=ANGLES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "".join(orientations.ornt2axcodes(layout)))
def test_the_centroid_of_a_mask_in_every_axis_layout(
    tmp_path: Path, layout: Any, angles: tuple[float, float, float]
) -> None:
    volume = make_layout(layout, angles)
    mask = mask_of(volume)
    write_nifti(tmp_path / "mask.nii.gz", mask, volume.affine, 1, "a mask")
    image = nib.load(tmp_path / "mask.nii.gz")
    assert isinstance(image, nib.Nifti1Image)
    found = np.asarray(image.dataobj)
    expected = centroid(mask, volume.affine)
    for affine, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        assert code == 1
        # float32, and a quaternion of float32
        np.testing.assert_allclose(centroid(found, affine), expected, atol=1e-4)


def test_the_qform_of_a_sheared_affine_is_off(tmp_path: Path) -> None:
    volume = make_layout(LAYOUTS[0], ANGLES["oblique"])
    affine = volume.affine.copy()
    affine[:3, 2] += 0.3 * affine[:3, 0]
    mask = mask_of(volume)
    write_nifti(tmp_path / "mask.nii.gz", mask, affine, 1, "a mask")
    image = nib.load(tmp_path / "mask.nii.gz")
    assert isinstance(image, nib.Nifti1Image)
    sform, code = image.get_sform(coded=True)
    assert code == 1
    np.testing.assert_allclose(centroid(np.asarray(image.dataobj), sform), centroid(mask, affine), atol=1e-4)
    assert image.get_qform(coded=True)[1] == 0
