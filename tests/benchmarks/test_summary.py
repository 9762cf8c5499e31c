import pytest

from benchmarks.summary import Summary, ratio, scale_factor, summarise


def test_summary_is_median_and_range() -> None:
    assert Summary.from_repeats([3.0, 1.0, 8.0]) == Summary(3.0, 1.0, 8.0)
    assert summarise([3.0, 1.0, 8.0], 1) == "3.0 [1.0, 8.0]"


def test_ratio_is_taken_repeat_by_repeat() -> None:
    # A disturbance in the second repeat lengthens both times and cancels out.
    assert ratio([20.0, 60.0, 24.0], [2.0, 6.0, 2.0]) == [10.0, 10.0, 12.0]
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_sample_is_scaled_to_all_slices() -> None:
    assert scale_factor(65, 65) == 1.0
    assert scale_factor(65, 2) == 32.5
    for sample in (0, 66):
        with pytest.raises(ValueError, match=f"{sample} slices"):
            scale_factor(65, sample)
