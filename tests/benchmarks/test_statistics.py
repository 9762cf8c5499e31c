"""Medians, ratios, scaling and average precision, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from benchmarks.statistics import Summary, average_precision, ratio, scale_factor


def test_a_summary_is_median_least_and_largest() -> None:
    assert Summary.of([3.0, 1.0, 8.0]) == Summary(3.0, 1.0, 8.0)
    assert Summary.of([3.0, 1.0, 8.0]).times(2) == Summary(6.0, 2.0, 16.0)


def test_a_ratio_is_taken_repeat_by_repeat() -> None:
    """The second repeat was disturbed: both took three times as long, and the ratio does not know."""
    assert ratio([20.0, 60.0, 24.0], [2.0, 6.0, 2.0]) == Summary(10.0, 10.0, 12.0)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratio([1.0, 2.0], [1.0])


def test_a_sample_is_scaled_by_the_slices_that_it_stands_for() -> None:
    assert scale_factor(65, 65) == 1.0
    assert scale_factor(65, 2) == 32.5
    for sample in (0, 66):
        with pytest.raises(ValueError, match=f"a sample of {sample} slices was found, expected 1 to 65"):
            scale_factor(65, sample)


def test_average_precision() -> None:
    truth = np.array([True, False, True, False])
    # Ranks 1 and 3 are hits: (1/1 + 2/3) / 2.
    assert average_precision(np.array([0.9, 0.8, 0.7, 0.1]), truth) == pytest.approx((1 + 2 / 3) / 2)
    # All alike: one threshold, whose precision is the share of hits.
    assert average_precision(np.zeros(4), truth) == pytest.approx(0.5)
    assert average_precision(np.array([np.nan, 0.8, 0.9, np.nan]), truth) == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)
    assert math.isnan(average_precision(np.ones(4), np.zeros(4, bool)))
