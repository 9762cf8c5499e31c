"""Real heads with their skull, through the shipped extractor; and the brains that stand alone."""

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

# Smallest and largest brain of the 20, as decision 11 has them.
HEADS = {"IXI213-HH-1642": 1180, "IXI527-HH-2376": 1838}
ORDINARY = "IXI211-HH-1568"
COUNTERPART = (sys.executable, "-c", "from app.cli import main; main()")
ALONE = (
    "t1_ds002748/sub-30_T1w",
    "ms_open_ms_data/patient07_T1_mni_brain_u16",
    "brats2013/brats_2013_pat0003_1_t1c_u8",
)


@pytest.fixture(scope="module")
def networks() -> ExtractionNetworks:
    return load_extractor(shipped_models() / EXTRACTOR).networks


def load(path: Path) -> nib.Nifti1Image:
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return image


def scan(real_scans: Path, name: str) -> Volume:
    image = load(real_scans / f"{name}.nii.gz")
    return Volume(np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine))


@pytest.mark.parametrize("name", HEADS)
def test_a_real_head(real_scans: Path, networks: ExtractionNetworks, name: str) -> None:
    found = extract_brain(scan(real_scans, f"ixi_2mm/t1/{name}_T1"), networks)
    assert isinstance(found, BrainExtraction)
    assert found.volume_ml == pytest.approx(HEADS[name], rel=0.01)
    assert found.agreement > 0.97
    assert found.cut_cm2 == 0


@pytest.mark.parametrize("name", ALONE)
def test_a_real_brain_alone_is_left_as_it_is(real_scans: Path, networks: ExtractionNetworks, name: str) -> None:
    assert isinstance(extract_brain(scan(real_scans, name), networks), NoBrainMask)


def test_an_ordinary_t1_with_skull_is_analysed(real_scans: Path, tmp_path: Path) -> None:
    """Of another scanner than training's: what is judged is the brain that was taken out, and nothing beside it."""
    path = real_scans / "ixi_2mm" / "t1" / f"{ORDINARY}_T1.nii.gz"
    subprocess.run([*COUNTERPART, "detect", str(path), "-o", str(tmp_path)], check=True, capture_output=True)
    head = load(path)
    brain, mask, anomaly = (load(tmp_path / f"{name}.nii.gz") for name in ("brain", "mask", "anomaly"))
    assert all(image.shape == head.shape and np.array_equal(image.affine, head.affine) for image in (brain, mask))
    inside, judged = brain.get_fdata() > 0, np.isfinite(anomaly.get_fdata())
    assert judged.sum() > 0.7 * inside.sum()
    # The grid of the slices ends on half a pixel, one voxel of this scan.
    assert not (judged & ~ndimage.binary_dilation(inside)).any()
    assert not (mask.get_fdata()[~judged]).any()


@pytest.mark.parametrize("name", ["M2208_T2w", "clinical_scct_ct_template"])
def test_what_the_networks_do_not_know_is_refused(real_scans: Path, networks: ExtractionNetworks, name: str) -> None:
    with pytest.raises(BrainNotExtracted, match=r"agree with a Dice of 0\.[78]"):
        extract_brain(scan(real_scans, f"nifti_misc/{name}"), networks)
