"""Tests of the crossed cluster bootstrap against variances that are known in closed form."""

import numpy as np
import pytest

from training.cluster_bootstrap import cluster_weights, crossed_weights, interval, mean, quantile, ratio

SUBJECTS, SHAPES = 12, 5
RNG = np.random.default_rng(3)
SUBJECT_EFFECT = RNG.normal(0, 1, SUBJECTS)
SHAPE_EFFECT = RNG.normal(0, 2, SHAPES)
ADDITIVE = SUBJECT_EFFECT[:, None] + SHAPE_EFFECT[None]
ROWS = [f"subject {i}" for i in range(SUBJECTS) for _ in range(SHAPES)]
COLUMNS = [f"shape {j}" for _ in range(SUBJECTS) for j in range(SHAPES)]


def draws(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return mean(values.ravel().tolist())(weights)


def test_variance_of_an_additive_table_is_the_sum_of_both_factors() -> None:
    """In a full table of subject effect plus shape effect, the resampled mean is the sum of two independent means."""
    expected = SUBJECT_EFFECT.var() / SUBJECTS + SHAPE_EFFECT.var() / SHAPES
    found = draws(ADDITIVE, crossed_weights(ROWS, COLUMNS)).var()
    assert found == pytest.approx(expected, rel=0.1)
    independent = draws(ADDITIVE, cluster_weights([str(i) for i in range(len(ROWS))], seed=0)).var()
    assert independent < expected / 5, "lesions of one shape are not independent"


def test_variance_of_pure_noise_is_conservative() -> None:
    """Without any effect, the expected variance in a large full table is three times the true one (Owen 2007)."""
    noise = np.random.default_rng(4).normal(size=(40, 40))
    rows = [str(i) for i in range(40) for _ in range(40)]
    columns = [str(j) for _ in range(40) for j in range(40)]
    found = draws(noise, crossed_weights(rows, columns)).var()
    assert 2 < found * noise.size < 4


def test_one_factor_gives_the_bootstrap_over_subjects() -> None:
    weights = cluster_weights(ROWS, seed=0)
    assert (weights.reshape(-1, SUBJECTS, SHAPES) == weights.reshape(-1, SUBJECTS, SHAPES)[:, :, :1]).all()
    assert (weights.sum(axis=1) == SUBJECTS * SHAPES).all()
    assert draws(ADDITIVE, weights).var() == pytest.approx(SUBJECT_EFFECT.var() / SUBJECTS, rel=0.1)


def test_subjects_are_resampled_within_their_group_and_groups_share_the_shapes() -> None:
    groups = ["home" if i < 4 else "other" for i in range(SUBJECTS) for _ in range(SHAPES)]
    home = np.array([group == "home" for group in groups])
    subjects = cluster_weights(ROWS, groups, seed=0)
    assert (subjects[:, home].sum(axis=1) == home.sum()).all()
    # Values that depend on the shape only have the same mean in both groups in each draw.
    by_shape = np.tile(np.exp(SHAPE_EFFECT), SUBJECTS)
    both = ratio(mean(by_shape[home].tolist()), mean(by_shape[~home].tolist()), home.tolist())
    found = interval(both, crossed_weights(ROWS, COLUMNS, groups))
    assert found == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("percent", [0, 2.5, 50, 90, 100])
def test_counts_are_repetitions(percent: float) -> None:
    values = np.random.default_rng(1).normal(size=7)
    counts = np.random.default_rng(2).integers(0, 4, (50, 7))
    counts[:, 3] += 1  # no draw is empty
    repeated = [np.repeat(values, draw) for draw in counts]
    assert quantile(values.tolist(), percent)(counts) == pytest.approx([np.percentile(r, percent) for r in repeated])
    assert mean(values.tolist())(counts) == pytest.approx([r.mean() for r in repeated])


def test_empty_draw_has_no_value() -> None:
    empty = np.array([[0, 0], [1, 0]])
    assert np.isnan(mean([1.0, 2.0])(empty)).tolist() == [True, False]
    assert np.isnan(quantile([1.0, 2.0])(empty)).tolist() == [True, False]
    assert interval(mean([1.0, 2.0]), empty) == (1.5, 1.0, 1.0)
    assert np.isnan(interval(ratio(mean([1.0]), mean([0.0]), [True, False]), empty)).all()


def test_interval_has_the_value_of_all_measurements() -> None:
    found = interval(quantile(ADDITIVE.ravel().tolist()), crossed_weights(ROWS, COLUMNS))
    assert found.value == np.median(ADDITIVE)
    assert found.low < found.value < found.high
