"""Tests of thresholds and ranges from healthy scans."""

import numpy as np
import pytest
from scipy import stats

from tests.support.bundle import tiny_manifest
from training.calibrate import (
    prediction_interval,
    residual_settings,
    residual_threshold,
    round_up_significant,
    separate_slices,
)
from training.config import ROOT, Config

VOXEL_ML = 0.1
SETTINGS = tiny_manifest().residual.model_copy(update={"threshold": 1.0, "extent_threshold": 0.5, "min_lesion_ml": 0.2})


def scan(*peaks: float) -> np.ndarray:
    """Return a map with plateaus of four voxels at the given heights."""
    values = np.zeros((1, 1, 6 * len(peaks) + 1), dtype=np.float32)
    for i, peak in enumerate(peaks):
        values[0, 0, 6 * i : 6 * i + 4] = peak
    values[0, 0, -1] = np.nan
    return values


def test_median_healthy_scan_has_no_more_than_the_allowed_volume() -> None:
    maps = [scan(0.1, 0.2, 0.3), scan(0.4, 0.5, 0.6), scan(0.7, 0.8, 0.9)]
    # The median scan is the second one: with one plateau of 0.4 ml allowed, the threshold must reach 0.5.
    at = residual_threshold(maps, SETTINGS, 0.4, VOXEL_ML)
    assert at == pytest.approx(0.5, abs=1e-4)
    assert residual_threshold(maps, SETTINGS, 0.0, VOXEL_ML) == pytest.approx(0.6, abs=1e-4)


def test_extent_threshold_keeps_its_ratio_to_the_threshold() -> None:
    ramp = np.array([[[0.1, 0.3, 0.6, 0.9]]], dtype=np.float32)
    # At 0.9 nothing is left. Just below it, the finding extends down to 0.45: two voxels.
    assert residual_threshold([ramp], SETTINGS, 0.1, VOXEL_ML) == pytest.approx(0.9, abs=1e-4)
    assert residual_threshold([ramp], SETTINGS, 0.2, VOXEL_ML) == pytest.approx(0.6, abs=1e-4)


def test_prediction_interval_has_the_stated_coverage() -> None:
    """Nine subjects and five scanners, as in the calibration, with known variances."""
    rng = np.random.default_rng(4)
    outside = []
    for _ in range(2000):
        subjects, scanners = rng.normal(0, 0.1, (10, 1)), rng.normal(0, 0.2, (10, 5))
        healthy = np.exp(1 + subjects + scanners)
        outside.append(not prediction_interval(healthy[:9], 0.05).contains(float(healthy[9, 0])))
    assert np.mean(outside) == pytest.approx(0.05, abs=0.015)


def test_prediction_interval_of_one_scanner_is_students() -> None:
    values = np.exp(np.random.default_rng(1).normal(0, 0.3, (9, 1)))
    logs = np.log(values[:, 0])
    reach = stats.t.ppf(0.995, 8) * logs.std(ddof=1) * np.sqrt(1 + 1 / 9)
    found = prediction_interval(values, 0.01)
    assert (found.low, found.high) == pytest.approx(np.exp([logs.mean() - reach, logs.mean() + reach]), rel=1e-4)


def test_separated_slices_have_nan_between_them() -> None:
    stack = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    separated = separate_slices(stack)
    assert separated.shape == (5, 2, 2)
    np.testing.assert_array_equal(separated[::2], stack)
    assert np.isnan(separated[1::2]).all()


def test_simulated_scanners_raise_the_threshold() -> None:
    config = Config.load(ROOT / "training" / "configs" / "t1.toml")
    quiet, noisy = np.zeros((1, 9, 9), np.float32), np.zeros((1, 9, 9), np.float32)
    noisy[0, 2:7, 2:7] = 0.3
    limits = {"simulated_false_positive_ml": 0.1, "min_threshold": 0.1}
    config = config.model_copy(update={"detection": config.detection.model_copy(update=limits)})
    alone = residual_settings([quiet], config)
    assert (alone.threshold, alone.simulated_false_positive_ml) == (0.1, None)
    raised = residual_settings([quiet], config, [quiet, noisy, noisy])
    assert raised.threshold == pytest.approx(0.3, abs=1e-4)
    assert raised.extent_threshold == pytest.approx(config.detection.extent_share * raised.threshold, rel=1e-4)
    assert raised.simulated_false_positive_ml == 0.1
    assert residual_settings([quiet], config, [quiet, quiet, noisy]).threshold == 0.1, "the median scan decides"


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.1329154, 0.132916), (0.132916, 0.132916), (0.9300000071, 0.930001), (12.0, 12.0)]
)
def test_threshold_is_rounded_up(value: float, rounded: float) -> None:
    """Rounded down, the threshold would let through the values that it was raised to exclude."""
    assert round_up_significant(value) == rounded
