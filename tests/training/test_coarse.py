"""Coarse noise stays in the head, leaves a share alone, and is the same for the same seed."""

from pathlib import Path

import numpy as np
import pytest

from app.volume import FloatArray
from training.coarse import add_coarse_noise
from training.config import ROOT, CoarseNoiseConfig, Config

CONFIG = Config.load(Path(ROOT, "training", "configs", "t1.toml")).coarse_noise


def heads(count: int) -> FloatArray:
    """Even discs on a black background, (N, 1, 96, 80)."""
    rows, columns = np.mgrid[-1:1:96j, -1:1:80j]
    disc = np.where(rows**2 + columns**2 < 0.7, 0.5, 0).astype(np.float32)
    return np.repeat(disc[None, None], count, axis=0)


def changed_share(config: CoarseNoiseConfig) -> FloatArray:
    """How much of each head was changed."""
    x = heads(300)
    y = add_coarse_noise(x, config, np.random.default_rng(5))
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
    change = add_coarse_noise(x, CONFIG, np.random.default_rng(6)) - x
    assert (change > 0.1).any(axis=(1, 2, 3)).mean() > 0.2
    assert (change < -0.1).any(axis=(1, 2, 3)).mean() > 0.2
    assert np.median(changed_share(CONFIG)) < 0.2


def test_the_same_seed_gives_the_same_noise() -> None:
    x = heads(8)
    first, second, other = (add_coarse_noise(x, CONFIG, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(x, heads(8))
