"""Counts in bins say what sorting every pixel says."""

import numpy as np
import pytest

from training.experiments.metrics import (
    Counts,
    auroc,
    average_precision,
    best_dice,
    difference,
    false_positive_rate,
    interval,
    mean_interval,
)

SUBJECTS = 7


@pytest.fixture(scope="module")
def scores() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    truths = [rng.random(2000) < 0.05 for _ in range(SUBJECTS)]
    return [rng.normal(t * 1.5, 1).astype(np.float32) for t in truths], truths


def test_average_precision_and_dice_are_those_of_every_threshold(
    scores: tuple[list[np.ndarray], list[np.ndarray]],
) -> None:
    counts = Counts.of(*scores)
    score, truth = (np.concatenate(part) for part in scores)
    hits = np.cumsum(truth[np.argsort(-score)])
    places = np.arange(1, len(score) + 1)
    ordered = truth[np.argsort(-score)]
    assert counts.statistic(average_precision) == pytest.approx((hits / places)[ordered].mean(), abs=2e-3)
    assert counts.statistic(best_dice) == pytest.approx((2 * hits / (places + truth.sum())).max(), abs=2e-3)


def test_auroc_is_the_chance_of_the_higher_score(scores: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    score, truth = (np.concatenate(part) for part in scores)
    pairs = score[truth][:, None] - score[~truth][None, :]
    expected = (pairs > 0).mean() + (pairs == 0).mean() / 2
    assert Counts.of(*scores).statistic(auroc) == pytest.approx(expected, abs=1e-3)


def test_what_is_not_judged_is_never_found() -> None:
    """NaN is the lowest score: a lesion there counts as missed."""
    score = np.array([np.nan, 0.9, 0.8, 0.1], np.float32)
    counts = Counts.of([score], [np.array([True, True, False, False])])
    assert counts.statistic(best_dice) == pytest.approx(2 / 3)
    assert counts.statistic(false_positive_rate(0.99)) == 1.0
    assert counts.statistic(false_positive_rate(0.5)) == 0.0


def test_a_difference_is_paired(scores: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    """The same method twice differs by nothing on every draw; a worse one by more than nothing on all."""
    values, truths = scores
    good = Counts.of(values, truths)
    rng = np.random.default_rng(1)
    poor = Counts.of([v + rng.normal(0, 2, len(v)).astype(np.float32) for v in values], truths)
    same = difference(good, good, average_precision)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    gap = difference(good, poor, average_precision)
    assert 0 < gap.low < gap.value < gap.high
    own = interval(good, average_precision)
    assert own.low < own.value < own.high


def test_the_interval_of_a_mean_holds_it() -> None:
    found = mean_interval([1.0, 2.0, 3.0, float("nan")])
    assert found.value == 2.0
    assert found.low < 2.0 < found.high
