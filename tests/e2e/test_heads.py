"""The shipped brain extractor on real heads with skull, and on skull-stripped scans."""

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from app.errors import BrainNotExtracted, NoBrainMask
from app.pipeline.brain_extraction import BrainExtraction, ExtractionNetworks, extract_brain
from app.runtime.bundle import shipped_models
from app.runtime.extractor import EXTRACTOR, load_extractor
from app.volume import Volume

pytestmark = pytest.mark.data

# Millilitres of the smallest and the largest of 20 brains (decision 11).
HEADS = {"IXI213-HH-1642": 1180, "IXI527-HH-2376": 1838}
OTHER_SCANNER = "IXI211-HH-1568"
COUNTERPART = (sys.executable, "-c", "from app.cli import main; main()")
SKULL_STRIPPED = (
    "t1_ds002748/sub-30_T1w",
    "ms_open_ms_data/patient07_T1_mni_brain_u16",
    "brats2013/brats_2013_pat0003_1_t1c_u8",
)


@pytest.fixture(scope="module")
def networks() -> ExtractionNetworks:
    return load_extractor(shipped_models() / EXTRACTOR).networks


def load_image(path: Path) -> nib.Nifti1Image:
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return image


def load_volume(real_scans: Path, name: str) -> Volume:
    image = load_image(real_scans / f"{name}.nii.gz")
    return Volume(np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine))


@pytest.mark.parametrize("name", HEADS)
def test_brain_of_a_real_head_is_extracted(real_scans: Path, networks: ExtractionNetworks, name: str) -> None:
    found = extract_brain(load_volume(real_scans, f"ixi_2mm/t1/{name}_T1"), networks)
    assert isinstance(found, BrainExtraction)
    assert found.volume_ml == pytest.approx(HEADS[name], rel=0.01)
    assert found.agreement > 0.97
    assert found.cut_cm2 == 0


@pytest.mark.parametrize("name", SKULL_STRIPPED)
def test_skull_stripped_scan_is_not_extracted(real_scans: Path, networks: ExtractionNetworks, name: str) -> None:
    assert isinstance(extract_brain(load_volume(real_scans, name), networks), NoBrainMask)


def test_t1_with_skull_is_analysed_inside_the_brain_only(real_scans: Path, tmp_path: Path) -> None:
    path = real_scans / "ixi_2mm" / "t1" / f"{OTHER_SCANNER}_T1.nii.gz"
    subprocess.run([*COUNTERPART, "detect", str(path), "-o", str(tmp_path)], check=True, capture_output=True)
    head = load_image(path)
    brain, mask, anomaly = (load_image(tmp_path / f"{name}.nii.gz") for name in ("brain", "mask", "anomaly"))
    assert all(image.shape == head.shape and np.array_equal(image.affine, head.affine) for image in (brain, mask))
    inside, analysed = brain.get_fdata() > 0, np.isfinite(anomaly.get_fdata())
    assert analysed.sum() > 0.7 * inside.sum()
    # The slice grid may exceed the brain by half a pixel, which is one voxel of this scan.
    assert not (analysed & ~ndimage.binary_dilation(inside)).any()
    assert not (mask.get_fdata()[~analysed]).any()


@pytest.mark.parametrize("name", ["M2208_T2w", "clinical_scct_ct_template"])
def test_other_images_are_refused(real_scans: Path, networks: ExtractionNetworks, name: str) -> None:
    with pytest.raises(BrainNotExtracted, match=r"agree with a Dice of 0\.[78]"):
        extract_brain(load_volume(real_scans, f"nifti_misc/{name}"), networks)
