"""Real heads with their skull, through the shipped extractor; and the brains that stand alone."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.brain import Brain, Networks, extract
from app.errors import BrainNotExtracted, NoBrainMask
from app.runtime.bundle import shipped_models
from app.runtime.extractor import EXTRACTOR, load_extractor
from app.volume import Volume

pytestmark = pytest.mark.data

# Smallest and largest brain of the 20, as decision 11 has them.
HEADS = {"IXI213-HH-1642": 1180, "IXI527-HH-2376": 1838}
ALONE = (
    "t1_ds002748/sub-30_T1w",
    "ms_open_ms_data/patient07_T1_mni_brain_u16",
    "brats2013/brats_2013_pat0003_1_t1c_u8",
)


@pytest.fixture(scope="module")
def networks() -> Networks:
    return load_extractor(shipped_models() / EXTRACTOR).networks


def scan(real_scans: Path, name: str) -> Volume:
    image = nib.load(real_scans / f"{name}.nii.gz")
    assert isinstance(image, nib.Nifti1Image)
    return Volume(np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine))


@pytest.mark.parametrize("name", HEADS)
def test_a_real_head(real_scans: Path, networks: Networks, name: str) -> None:
    found = extract(scan(real_scans, f"ixi_2mm/t1/{name}_T1"), networks)
    assert isinstance(found, Brain)
    assert found.volume_ml == pytest.approx(HEADS[name], rel=0.01)
    assert found.agreement > 0.97
    assert found.cut_cm2 == 0


@pytest.mark.parametrize("name", ALONE)
def test_a_real_brain_alone_is_left_as_it_is(real_scans: Path, networks: Networks, name: str) -> None:
    assert isinstance(extract(scan(real_scans, name), networks), NoBrainMask)


@pytest.mark.parametrize("name", ["M2208_T2w", "clinical_scct_ct_template"])
def test_what_the_networks_do_not_know_is_refused(real_scans: Path, networks: Networks, name: str) -> None:
    with pytest.raises(BrainNotExtracted, match=r"agree with a Dice of 0\.[78]"):
        extract(scan(real_scans, f"nifti_misc/{name}"), networks)
