"""Synthetic lesion of known size at a known position."""

import numpy as np
import pytest

from app.pipeline.synthetic_lesion import insert_lesion

SPACING = np.array([1.0, 1.0, 2.0])


def scan() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a brain with a ramp of intensities, its mask, and a box that reaches beyond it."""
    array = np.zeros((20, 20, 12), dtype=np.float32)
    brain = np.zeros(array.shape, dtype=bool)
    brain[3:17, 3:17, 2:10] = True
    array[brain] = np.linspace(100, 200, int(brain.sum()))
    shape = np.zeros_like(array)
    shape[6:20, 6:14, 4:8] = 1
    return array, brain, shape


@pytest.mark.parametrize("contrast", [0.35, -0.35])
def test_change_is_a_fraction_of_the_robust_range(contrast: float) -> None:
    array, brain, shape = scan()
    changed, truth = insert_lesion(array, brain, shape, SPACING, contrast)
    low, high = np.percentile(array[brain], (2, 98))
    assert changed[10, 10, 6] - array[10, 10, 6] == pytest.approx(contrast * (high - low), rel=1e-4)
    np.testing.assert_array_equal(truth, (shape > 0) & brain)
    np.testing.assert_array_equal(changed[~brain], array[~brain])
    assert changed.dtype == np.float32


def test_intensity_does_not_fall_below_0() -> None:
    array, brain, shape = scan()
    changed, _ = insert_lesion(array, brain, shape, SPACING, -9.0)
    assert changed.min() == 0


def test_edge_is_smoothed_over_about_a_millimetre() -> None:
    array, brain, shape = scan()
    changed, _ = insert_lesion(array, brain, shape, SPACING, 0.35)
    fraction = (changed - array)[4:9, 10, 6] / (changed - array)[10, 10, 6]
    # A step smoothed by a Gaussian of 0.5 mm, at half a voxel from the step.
    assert fraction[1] == pytest.approx(0.11, abs=0.06)
    assert fraction[2] == pytest.approx(0.89, abs=0.06)
    assert fraction[0] < 0.01
    assert fraction[4] > 0.99
