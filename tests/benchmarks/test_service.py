from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("torch")

from app.volume import Volume
from benchmarks.ct_series import AIR_HU, NOISE_HU, MissingDataError, make_series, make_volume
from benchmarks.service import run_service, time_start
from tests.support.phantom import brain, grid

SHAPE = (52, 64, 48)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    head = brain(SHAPE, grid(SHAPE))
    array = np.round(head.array / head.array.max() * 4095).astype(np.int16)
    nib.save(nib.Nifti1Image(array, head.affine), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_ct_series_covers_the_space_of_the_head_with_lps_axes() -> None:
    affine = grid((20, 24, 16), 5.0)
    array = np.full((20, 24, 16), 40.0, np.float32)
    array[0, 0, 0] = 80.0
    head = Volume(array, affine)
    made = make_volume(head, (40, 47, 31))
    assert made.shape == (40, 47, 31)
    assert nib.aff2axcodes(made.affine) == ("L", "P", "S")
    # The first voxel is the right anterior inferior corner, the last one the opposite corner.
    np.testing.assert_allclose(made.affine[:3, 3], [47.5, 57.5, -37.5])
    last = made.affine @ [39, 46, 30, 1]
    np.testing.assert_allclose(last[:3], [-47.5, -57.5, 37.5])
    assert np.array_equal(made.array, np.round(made.array))
    assert made.array.mean() == pytest.approx(40.0, abs=0.1)
    assert made.array.std() == pytest.approx(NOISE_HU, abs=0.2)
    # The left posterior inferior corner, which is the first voxel of the head.
    assert made.array[-1, -1, 0] == pytest.approx(80.0, abs=4 * NOISE_HU)
    assert made.array.min() >= AIR_HU
    np.testing.assert_array_equal(make_volume(head, (40, 47, 31)).array, made.array)


def test_missing_head_is_reported(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="ge_ct_head_human_28"):
        make_series(tmp_path, tmp_path)


def test_same_upload_is_analysed_each_time(tiny_models: Path, scan: Path) -> None:
    with run_service(tiny_models, threads=1) as service:
        runs = [service.analyse(scan) for _ in range(2)]
        peak = service.peak_bytes()
    assert [run["id"] for run in runs] == ["tiny-0.0.1"] * 2
    for run in runs:
        assert 0 < run["upload"] < run["seconds"] < 120
        assert run["work"]["seconds"]["infer"] > 0
    # The second upload did not return the job of the first.
    assert runs[0]["work"]["seconds"] != runs[1]["work"]["seconds"]
    assert 50e6 < peak < 4e9


def test_start_of_the_command_line_is_timed(tiny_models: Path, scan: Path) -> None:
    seconds = time_start(scan, tiny_models)
    assert 0 < seconds["help"] < 60
    assert 0 < seconds["scan"] < 60
