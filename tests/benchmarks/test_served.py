"""What is sent to the service: the CT series, variants of a scan; and uploads that are all analysed."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("torch")

from app.volume import Volume
from benchmarks.missing import Missing
from benchmarks.scaling import at_spacing, fewer_slices, write
from benchmarks.series import AIR_HU, NOISE_HU, make_series, make_volume
from benchmarks.served import serve
from tests.support.phantom import brain, grid

SHAPE = (52, 64, 48)


def test_the_series_spans_the_heads_own_space_in_the_scanners_axes() -> None:
    affine = grid((20, 24, 16), 5.0)
    array = np.full((20, 24, 16), 40.0, np.float32)
    array[0, 0, 0] = 80.0
    head = Volume(array, affine)
    made = make_volume(head, (40, 47, 31))
    assert made.shape == (40, 47, 31)
    assert nib.aff2axcodes(made.affine) == ("L", "P", "S")
    # The first voxel is the right, front, lower corner's; the last one the opposite.
    np.testing.assert_allclose(made.affine[:3, 3], [47.5, 57.5, -37.5])
    last = made.affine @ [39, 46, 30, 1]
    np.testing.assert_allclose(last[:3], [-47.5, -57.5, 37.5])
    assert np.array_equal(made.array, np.round(made.array))
    assert made.array.mean() == pytest.approx(40.0, abs=0.1)
    assert made.array.std() == pytest.approx(NOISE_HU, abs=0.2)
    # The left, back, lower corner in the head's axes, along RAS+: here the last column and row of the first slice.
    assert made.array[-1, -1, 0] == pytest.approx(80.0, abs=4 * NOISE_HU)
    assert made.array.min() >= AIR_HU
    np.testing.assert_array_equal(make_volume(head, (40, 47, 31)).array, made.array)


def test_without_its_head_the_series_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="ge_ct_head_human_28"):
        make_series(tmp_path, tmp_path)


def test_the_middle_slices_stay_where_they_were() -> None:
    head = brain(SHAPE, grid(SHAPE))
    half = fewer_slices(head, 0.5)
    assert half.shape == (52, 64, 24)
    np.testing.assert_array_equal(half.array, head.array[:, :, 12:36])
    np.testing.assert_allclose(half.affine[:3, 3] - head.affine[:3, 3], [0, 0, 36.0])
    # Foot to head may be any axis.
    turned = Volume(head.array.transpose(2, 0, 1), head.affine[:, [2, 0, 1, 3]])
    assert fewer_slices(turned, 0.25).shape == (12, 52, 64)


def test_another_spacing_shows_the_same_head() -> None:
    head = brain(SHAPE, grid(SHAPE))
    coarse = at_spacing(head, 6.0)
    np.testing.assert_allclose(nib.affines.voxel_sizes(coarse.affine), 6.0)
    assert coarse.array.sum() * 8 == pytest.approx(head.array.sum(), rel=0.03)


def test_the_same_bytes_are_analysed_each_time(tiny_models: Path, tmp_path: Path) -> None:
    path = write(brain(SHAPE, grid(SHAPE)), tmp_path / "scan.nii.gz")
    assert nib.load(path).get_data_dtype() == np.int16  # type: ignore[attr-defined]
    with serve(tiny_models, threads=1) as served:
        runs = [served.analyse(path) for _ in range(2)]
        both = served.together([path] * 2)
        peak = served.peak_bytes()
        assert next(served.seeds) == 4
    assert [run["id"] for run in runs] == ["tiny-0.0.1"] * 2
    for run in runs:
        assert 0 < run["upload"] < run["seconds"] < 120
        # The second was not the first one's job: it took its own time to infer.
        assert run["work"]["seconds"]["infer"] > 0
    assert runs[0]["work"]["seconds"] != runs[1]["work"]["seconds"]
    assert 0 < both < 120
    assert 50e6 < peak < 4e9
