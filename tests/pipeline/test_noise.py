"""Noise depends on what it is for, and on nothing else."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from app.pipeline.diffusion import KeyedNoise, Purpose

NOISE = KeyedNoise(7, (2, 6, 5))
SLICES = np.array([3, 10, 4, 0])


def test_it_is_standard_normal() -> None:
    drawn = KeyedNoise(7, (4, 50, 50))(Purpose.KL, np.arange(5), 500)
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 0.01
    assert drawn.dtype == np.float32


def test_batching_skipping_and_order_change_nothing() -> None:
    together = NOISE(Purpose.KL, SLICES, 500)
    halves = np.concatenate([NOISE(Purpose.KL, SLICES[:2], 500), NOISE(Purpose.KL, SLICES[2:], 500)])
    np.testing.assert_array_equal(together, halves)
    np.testing.assert_array_equal(together[::-1], NOISE(Purpose.KL, SLICES[::-1], 500))
    np.testing.assert_array_equal(together[[2]], NOISE(Purpose.KL, SLICES[[2]], 500))


def test_no_two_keys_share_a_draw() -> None:
    """Neither with each other, nor by one key's numbers being another's, moved along."""
    firsts = [
        KeyedNoise(seed, (1, 2, 2), view)(purpose, np.array([index]), t).tobytes()
        for seed, purpose, t, index, view in product(
            (0, 1, 2, 3, 2**32, 2**40 + 1), Purpose, (1, 2, 3, 500), (0, 1, 2, 3), (0, 1, 2)
        )
    ]
    assert len(set(firsts)) == len(firsts)


def test_keys_that_differ_are_uncorrelated() -> None:
    large = KeyedNoise(7, (4, 50, 50))
    one = large(Purpose.KL, np.array([0]), 500).ravel()
    others = [
        large(Purpose.KL, np.array([1]), 500),
        large(Purpose.KL, np.array([0]), 501),
        large(Purpose.START, np.array([0]), 500),
        KeyedNoise(8, (4, 50, 50))(Purpose.KL, np.array([0]), 500),
    ]
    for other in others:
        # 10,000 pairs: the standard error of a correlation is 0.01.
        assert np.corrcoef(one, other.ravel())[0, 1] == pytest.approx(0, abs=0.045)


def test_numbers_are_those_of_the_first_release() -> None:
    """A seed in an old report must go on giving the same mask: these values may never change."""
    drawn = KeyedNoise(7, (1, 1, 3))(Purpose.START, np.array([5]), 500).ravel()
    assert drawn.tolist() == pytest.approx([-0.0698896, 0.6960229, 1.5043923], abs=1e-6)
