import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks.accuracy import choose_slices


def test_slices_with_and_without_lesion_are_chosen_evenly() -> None:
    truth = np.zeros((20, 2, 2), bool)
    truth[5:12, 0, 0] = True
    assert choose_slices(truth).tolist() == [0, 4, 5, 7, 9, 11, 15, 19]
    truth[6:12] = False
    assert choose_slices(truth).tolist() == [0, 5, 7, 13, 19]
