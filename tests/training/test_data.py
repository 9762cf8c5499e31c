"""Copies of training scans: thicker slices keep the anatomy in its place."""

import numpy as np
import pytest
from nibabel import affines

from app.volume import Volume
from tests.support.grids import tilted
from tests.support.phantom import grid
from training.config import ROOT, Config
from training.data import copy_scan, thicken_slices

SHAPE = (30, 34, 26)


@pytest.fixture
def config() -> Config:
    whole = Config.load(ROOT / "training" / "configs" / "t1.toml")
    return whole.model_copy(update={"data": whole.data.model_copy(update={"max_slice_mm": 5.0})})


def ramp() -> Volume:
    """Return a brain whose value at a voxel is a linear function of its place, on an oblique grid of 1.25 mm."""
    affine = tilted(grid(SHAPE, 1.25), 5, -10, 15)
    points = affines.apply_affine(affine, np.moveaxis(np.indices(SHAPE), 0, -1))
    return Volume((points @ [1.0, 2.0, 3.0] + 500).astype(np.float32), affine)


def test_half_of_the_copies_have_thicker_slices_that_show_the_same_place(config: Config) -> None:
    volume = ramp()
    ratios = []
    for seed in range(60):
        thick = thicken_slices(volume, config, np.random.default_rng(seed))
        ratios.append((thick.spacing / volume.spacing).round(6).tolist())
        points = affines.apply_affine(thick.affine, np.moveaxis(np.indices(thick.shape), 0, -1))
        np.testing.assert_allclose(thick.array, points @ [1.0, 2.0, 3.0] + 500, rtol=1e-4)
    changed = [ratio for ratio in ratios if ratio != [1, 1, 1]]
    assert 20 <= len(changed) <= 40
    assert {max(ratio) for ratio in changed} == {2, 3, 4}  # up to 5 mm
    assert {int(np.argmax(ratio)) for ratio in changed} == {0, 1, 2}


def test_background_does_not_darken_the_edge(config: Config) -> None:
    array = np.zeros(SHAPE, dtype=np.float32)
    array[5:24, 5:28, 5:20] = 100
    for seed in range(20):
        thick = thicken_slices(Volume(array, grid(SHAPE, 1.25)), config, np.random.default_rng(seed))
        assert set(np.unique(thick.array)) == {0, 100}


def test_copies_without_thicker_slices_share_the_voxels(config: Config) -> None:
    plain = config.model_copy(update={"data": config.data.model_copy(update={"max_slice_mm": 0.0})})
    volume = ramp()
    copied = copy_scan(volume, plain, np.random.default_rng(0))
    assert copied.array is volume.array
    assert not np.allclose(copied.affine, volume.affine)
