"""Coarse noise stays in the head, leaves a share alone, and is the same for the same seed."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from app.volume import FloatArray  # noqa: E402
from training.coarse import add_coarse_noise  # noqa: E402
from training.config import ROOT, CoarseNoiseConfig, Config  # noqa: E402

pytestmark = pytest.mark.training

CONFIG = Config.load(Path(ROOT, "training", "configs", "t1.toml")).coarse_noise


def heads(count: int) -> FloatArray:
    """Even discs on a black background, (N, 1, 96, 80)."""
    rows, columns = np.mgrid[-1:1:96j, -1:1:80j]
    disc = np.where(rows**2 + columns**2 < 0.7, 0.5, 0).astype(np.float32)
    return np.repeat(disc[None, None], count, axis=0)


def with_noise(x: FloatArray, config: CoarseNoiseConfig, seed: int) -> FloatArray:
    """The same heads with coarse noise."""
    changed: FloatArray = add_coarse_noise(torch.from_numpy(x), config, torch.Generator().manual_seed(seed)).numpy()
    return changed


def changed_share(config: CoarseNoiseConfig) -> FloatArray:
    """How much of each head was changed."""
    x = heads(300)
    y = with_noise(x, config, 5)
    assert y.dtype == np.float32
    assert y.min() >= 0
    assert y.max() <= 1
    assert not y[x == 0].any(), "nothing is drawn beside the head"
    return np.asarray(((np.abs(y - x) > 0.05) & (x > 0)).sum(axis=(1, 2, 3)) / (x > 0).sum(axis=(1, 2, 3)))


def test_a_share_of_the_slices_is_left_alone() -> None:
    untouched = np.mean(changed_share(CONFIG) == 0)
    assert untouched == pytest.approx(1 - CONFIG.share, abs=0.12)  # some changes are below 0.05
    assert np.all(changed_share(CONFIG.model_copy(update={"share": 0.0})) == 0)


def test_patches_are_bright_and_dark_and_small() -> None:
    x = heads(300)
    change = with_noise(x, CONFIG, 6) - x
    assert (change > 0.1).any(axis=(1, 2, 3)).mean() > 0.2
    assert (change < -0.1).any(axis=(1, 2, 3)).mean() > 0.2
    assert np.median(changed_share(CONFIG)) < 0.2


def test_the_same_seed_gives_the_same_noise() -> None:
    x = heads(8)
    first, second, other = (with_noise(x, CONFIG, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(x, heads(8))


def test_as_much_of_each_head_is_covered_as_is_said() -> None:
    """Two sets of patches, each over 1 to 12 % of the head, with soft edges."""
    config = CONFIG.model_copy(update={"share": 1.0, "edge_pixels": (0.01, 0.01), "level_sd": 0.0})
    x = heads(300)
    covered = (np.abs(with_noise(x, config, 7) - x) > 0.04).sum(axis=(1, 2, 3)) / (x > 0).sum(axis=(1, 2, 3))
    low, high = (2 * share for share in config.covered)
    assert low - 0.01 < covered.min()
    assert covered.max() < high + 0.01
    assert covered.mean() == pytest.approx((low + high) / 2, abs=0.015)


def test_an_empty_slice_stays_empty() -> None:
    x = np.zeros((3, 1, 96, 80), np.float32)
    np.testing.assert_array_equal(with_noise(x, CONFIG, 8), x)
