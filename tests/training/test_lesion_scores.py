"""Tests of lesion-wise scores against counts made by hand."""

import numpy as np
import pytest

from training.lesion_scores import LesionScores, score_lesions, size_class, size_class_name


@pytest.fixture
def truth() -> np.ndarray:
    """Return a lesion of 8 voxels, one of 27, and a single voxel."""
    array = np.zeros((20, 20, 20), np.bool_)
    array[1:3, 1:3, 1:3] = True
    array[8:11, 8:11, 8:11] = True
    array[18, 18, 18] = True
    return array


def test_lesion_with_one_marked_voxel_is_found(truth: np.ndarray) -> None:
    labels = np.zeros(truth.shape, np.uint16)
    labels[2, 2, 2] = 1  # touches the first lesion
    labels[5:7, 15, 15] = 2  # touches none
    scores = score_lesions(labels, truth, 0.1)
    assert scores.lesions == ((0.8, True), (2.7, False), (0.1, False))
    assert scores.false_findings == 1
    assert scores.false_ml == pytest.approx(0.2)


def test_small_lesions_are_not_counted_but_a_finding_in_them_is_not_false(truth: np.ndarray) -> None:
    labels = np.zeros(truth.shape, np.uint16)
    labels[18, 18, 18] = 1
    scores = score_lesions(labels, truth, 0.01)
    assert scores == LesionScores(((0.08, False), (0.27, False)), 0, 0.0)


def test_diagonal_neighbours_are_one_lesion() -> None:
    truth = np.zeros((4, 4, 4), np.bool_)
    truth[0, 0, 0] = truth[1, 1, 1] = True
    assert score_lesions(np.zeros(truth.shape, np.uint16), truth, 1.0).lesions == ((2.0, False),)


def test_size_classes_begin_at_their_lower_limit() -> None:
    assert [size_class(ml) for ml in (0.05, 0.49, 0.5, 2.0, 9.9, 10.0, 300.0)] == [0, 0, 1, 2, 2, 3, 3]
    assert [size_class_name(i) for i in (0, 3)] == ["0.05 to 0.5 ml", "10 ml and more"]
