"""Scores of tumours from counts are those that a count by hand gives."""

import numpy as np
import pytest

from training.tumour_scores import average_precision, counted, interval_over_patients, pooled_dice, slice_dice

# Two slices of four voxels: in the first, two of a tumour, one of them seen best; the second has none.
VALUES = np.array([[0.9, 0.8, 0.5, np.nan], [0.7, 0.1, 0.0, 0.0]], np.float32).T[:, None, :]
TRUTH = np.array([[True, False, True, False], [False] * 4]).T[:, None, :]


def test_counts_hold_every_voxel_and_what_was_not_analysed_as_healthy() -> None:
    counts = counted(VALUES, TRUTH)
    assert counts.sum(axis=2).tolist() == [[2, 2], [4, 0]]
    assert counts[0, 0, 0] == 1


def test_best_dice_and_average_precision() -> None:
    counts = counted(VALUES, TRUTH)
    # In order: hit, miss, miss (of the second slice), hit. Best: the first alone, 2 / (1 + 2), or all, 4 / (4 + 2).
    assert pooled_dice(counts) == pytest.approx(2 / 3)
    assert average_precision(counts) == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)
    assert slice_dice(counts) == pytest.approx(4 / 5)  # hit, miss, hit: 2 * 2 / (3 + 2)


def test_values_above_one_keep_their_order() -> None:
    """A residual over local contrast has no upper end."""
    assert average_precision(counted(VALUES * 20, TRUTH)) == average_precision(counted(VALUES, TRUTH))
    assert counted(np.where(VALUES > 0.85, np.inf, VALUES), TRUTH).sum(axis=2).tolist() == [[2, 2], [4, 0]]
    assert pooled_dice(counted(VALUES * 20, TRUTH)) == pooled_dice(counted(VALUES, TRUTH))


def test_intervals_are_over_patients() -> None:
    perfect = counted(TRUTH.astype(np.float32), TRUTH)
    blind = counted(np.zeros_like(VALUES), TRUTH)
    draws = np.array([[0, 0], [1, 1]])
    found = interval_over_patients([perfect, blind], draws)
    assert found["auprc"][1] == pytest.approx(0.25 + 0.025 * 0.75)  # blind alone: the share of tumour, 2 of 8
    assert found["auprc"][2] == pytest.approx(1 - 0.025 * 0.75)
