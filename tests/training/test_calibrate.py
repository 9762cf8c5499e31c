"""The residual threshold is the lowest one that healthy scans stay under."""

import numpy as np
import pytest

from tests.support.bundle import tiny_manifest
from training.calibrate import residual_threshold

VOXEL_ML = 0.1
SETTINGS = tiny_manifest().residual.model_copy(update={"threshold": 1.0, "extent_threshold": 0.5, "min_lesion_ml": 0.2})


def scan(*peaks: float) -> np.ndarray:
    """A map with plateaus of four voxels at some heights."""
    values = np.zeros((1, 1, 6 * len(peaks) + 1), dtype=np.float32)
    for i, peak in enumerate(peaks):
        values[0, 0, 6 * i : 6 * i + 4] = peak
    values[0, 0, -1] = np.nan
    return values


def test_the_median_healthy_scan_shows_no_more_than_is_allowed() -> None:
    maps = [scan(0.1, 0.2, 0.3), scan(0.4, 0.5, 0.6), scan(0.7, 0.8, 0.9)]
    # The median scan is the second: with one plateau of 0.4 ml allowed, 0.5 must stay under.
    at = residual_threshold(maps, SETTINGS, 0.4, VOXEL_ML)
    assert at == pytest.approx(0.5, abs=1e-4)
    assert residual_threshold(maps, SETTINGS, 0.0, VOXEL_ML) == pytest.approx(0.6, abs=1e-4)


def test_the_extent_keeps_its_share_of_the_threshold() -> None:
    ramp = np.array([[[0.1, 0.3, 0.6, 0.9]]], dtype=np.float32)
    # At 0.9 nothing is left. Just under it, the finding reaches down to 0.45: two voxels.
    assert residual_threshold([ramp], SETTINGS, 0.1, VOXEL_ML) == pytest.approx(0.9, abs=1e-4)
    assert residual_threshold([ramp], SETTINGS, 0.2, VOXEL_ML) == pytest.approx(0.6, abs=1e-4)
