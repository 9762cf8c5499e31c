"""Binned score counts against statistics over every pixel."""

import numpy as np
import pytest

from training.experiments.metrics import (
    ScoreCounts,
    auroc,
    average_precision,
    best_dice,
    bootstrap_interval,
    exact_counts,
    fpr_at_sensitivity,
    mean_interval,
    paired_difference,
)

SUBJECTS = 7


@pytest.fixture(scope="module")
def scores() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    truths = [rng.random(2000) < 0.05 for _ in range(SUBJECTS)]
    return [rng.normal(t * 1.5, 1).astype(np.float32) for t in truths], truths


def test_average_precision_and_dice_equal_those_of_every_threshold(
    scores: tuple[list[np.ndarray], list[np.ndarray]],
) -> None:
    score, truth = (np.concatenate(part) for part in scores)
    ordered = truth[np.argsort(-score)]
    hits, places = np.cumsum(ordered), np.arange(1, len(score) + 1)
    expected = {
        average_precision: (hits / places)[ordered].mean(),
        best_dice: (2 * hits / (places + truth.sum())).max(),
    }
    for statistic, value in expected.items():
        assert statistic(*exact_counts(score, truth)) == pytest.approx(value)
        assert ScoreCounts.from_scores(*scores).pooled(statistic) == pytest.approx(value, abs=2e-3)


def test_equal_scores_are_one_threshold() -> None:
    score, truth = np.array([0.9, 0.5, 0.5, 0.1]), np.array([False, True, False, True])
    positive, negative = exact_counts(score, truth)
    assert (positive.tolist(), negative.tolist()) == ([1, 1, 0], [0, 1, 1])
    assert average_precision(positive, negative) == pytest.approx(0.5 * (1 / 3) + 0.5 * (2 / 4))


def test_auroc_is_the_probability_of_the_higher_score(scores: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    score, truth = (np.concatenate(part) for part in scores)
    pairs = score[truth][:, None] - score[~truth][None, :]
    expected = (pairs > 0).mean() + (pairs == 0).mean() / 2
    assert ScoreCounts.from_scores(*scores).pooled(auroc) == pytest.approx(expected, abs=1e-3)


def test_nan_is_the_lowest_score() -> None:
    score, truth = np.array([np.nan, 0.9, 0.8, 0.1], np.float32), np.array([True, True, False, False])
    counts = ScoreCounts.from_scores([score], [truth])
    assert counts.pooled(best_dice) == best_dice(*exact_counts(score, truth)) == pytest.approx(2 / 3)
    assert counts.pooled(fpr_at_sensitivity(0.99)) == 1.0
    assert counts.pooled(fpr_at_sensitivity(0.5)) == 0.0


def test_difference_is_paired(scores: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    values, truths = scores
    good = ScoreCounts.from_scores(values, truths)
    rng = np.random.default_rng(1)
    poor = ScoreCounts.from_scores([v + rng.normal(0, 2, len(v)).astype(np.float32) for v in values], truths)
    same = paired_difference(good, good, average_precision)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    gap = paired_difference(good, poor, average_precision)
    assert 0 < gap.low < gap.value < gap.high
    own = bootstrap_interval(good, average_precision)
    assert own.low < own.value < own.high


def test_mean_leaves_out_nan() -> None:
    found = mean_interval([1.0, 2.0, 3.0, float("nan")])
    assert found.low < found.value == 2.0 < found.high
