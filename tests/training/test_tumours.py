"""A patient's tumour lies where it was outlined, in the slice it was outlined in."""

from pathlib import Path

import numpy as np
import pytest

from training.config import ROOT, Config
from training.splits import load_split
from training.tumours import load_tumour_scan, tumour_scans

CONFIG = ROOT / "training" / "configs" / "flair.toml"


@pytest.fixture
def flair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Two patients, four pictures of 16 x 24 each, in no order; bright where the tumour is."""
    monkeypatch.setenv("COUNTERPART_DATA", str(tmp_path))
    masks = np.zeros((8, 16, 24), dtype=np.bool_)
    masks[2, 3:6, 10:20] = True
    (tmp_path / "lgg_flair").mkdir()
    np.savez(
        tmp_path / "lgg_flair" / "lgg_flair_192_u8.npz",
        images=np.where(masks, 200, np.arange(24)).astype(np.uint8),
        masks=np.packbits(masks.reshape(8, -1), axis=1),
        patient=np.array(list("abababab")),
        slice_no=np.array([9, 3, 7, 4, 8, 5, 6, 6], dtype=np.int16),
        tumour_px_256=masks.sum(axis=(1, 2)).astype(np.int32),
    )
    return Config.load(CONFIG)


def test_the_truth_lies_on_the_pictures(flair: Config) -> None:
    scan = load_tumour_scan(flair, "a")
    assert scan.volume.shape == scan.truth.shape == (24, 16, 4)
    assert np.flatnonzero(scan.truth.any(axis=(0, 1))).tolist() == [1]  # the second from below
    np.testing.assert_array_equal(scan.truth, scan.volume.array > 100)
    assert scan.healthy.tolist() == [False, False, False, True]


def test_another_patient_has_none(flair: Config) -> None:
    (scan,) = tumour_scans(flair, ["b"])
    assert not scan.truth.any()
    assert scan.healthy.all()


@pytest.mark.data
def test_every_test_patient_has_a_tumour_and_slices_without(real_scans: Path) -> None:
    assert real_scans.exists()
    config = Config.load(CONFIG)
    scans = list(tumour_scans(config, load_split(config.data.splits).test))
    assert len(scans) == 27
    assert all(scan.truth.any() for scan in scans)
    assert sum(scan.volume.shape[2] for scan in scans) == 513
    assert sum(int(scan.truth.any(axis=(0, 1)).sum()) for scan in scans) == 340
    # FLAIR shows a tumour brighter than the rest of the head.
    brighter = [s.volume.array[s.truth].mean() > s.volume.array[s.volume.array > 0].mean() for s in scans]
    assert np.mean(brighter) > 0.9
