"""The residual threshold is the lowest one that healthy scans stay under."""

import numpy as np
import pytest
from scipy import stats

from tests.support.bundle import tiny_manifest
from training.calibrate import next_healthy, residual_threshold

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


def test_the_next_healthy_scan_is_held_as_often_as_promised() -> None:
    """Nine subjects and five scanners as in calibration, whose differences are known here."""
    rng = np.random.default_rng(4)
    outside = []
    for _ in range(2000):
        subjects, scanners = rng.normal(0, 0.1, (10, 1)), rng.normal(0, 0.2, (10, 5))
        healthy = np.exp(1 + subjects + scanners)
        outside.append(not next_healthy(healthy[:9], 0.05).contains(float(healthy[9, 0])))
    assert np.mean(outside) == pytest.approx(0.05, abs=0.015)


def test_one_scanner_gives_students_interval() -> None:
    values = np.exp(np.random.default_rng(1).normal(0, 0.3, (9, 1)))
    logs = np.log(values[:, 0])
    reach = stats.t.ppf(0.995, 8) * logs.std(ddof=1) * np.sqrt(1 + 1 / 9)
    found = next_healthy(values, 0.01)
    assert (found.low, found.high) == pytest.approx(np.exp([logs.mean() - reach, logs.mean() + reach]), rel=1e-4)
