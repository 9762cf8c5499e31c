"""Tests of the thresholds that a scan raises by itself."""

import numpy as np
import pytest

pytest.importorskip("torch")

from app.pipeline.risk_control import scale_thresholds
from app.volume import FloatArray
from tests.support.bundle import tiny_manifest
from training.experiments.scan_threshold import Rule, raise_thresholds

pytestmark = pytest.mark.training

VOXEL_ML = 0.01
RULE = Rule(percentile=99.0, finding_ml=0.5)
SETTINGS = tiny_manifest().residual.model_copy(update={"threshold": 1.0, "extent_threshold": 0.6, "min_lesion_ml": 0.0})


# Share of the spikes below percentile 99 of all voxels, if one voxel in 27 is a spike of uniform height.
SHARE = 1 - 0.01 * 27


def noise(scale: float) -> FloatArray:
    """Return separate spikes of 0 to `scale` in every third voxel, with a border that was not analysed."""
    values = np.zeros((30, 60, 60), np.float32)
    values[::3, ::3, ::3] = np.random.default_rng(0).uniform(0, scale, (10, 20, 20))
    values[:, :3] = np.nan
    return values


def with_ball(values: FloatArray, height: float) -> FloatArray:
    """Return a map with a finding of 14 ml."""
    z, y, x = np.indices(values.shape)
    changed = values.copy()
    changed[(z - 15) ** 2 + (y - 30) ** 2 + (x - 30) ** 2 < 49] = height
    return changed


def test_thresholds_of_a_calibrated_scan_stay() -> None:
    assert raise_thresholds(noise(0.9), SETTINGS, RULE, VOXEL_ML) == SETTINGS


def test_thresholds_stay_without_a_rule() -> None:
    assert raise_thresholds(noise(5.0), SETTINGS, None, VOXEL_ML) is SETTINGS


def test_noise_of_the_scan_raises_both_thresholds_by_one_factor() -> None:
    raised = raise_thresholds(noise(2.0), SETTINGS, RULE, VOXEL_ML)
    assert raised.threshold == pytest.approx(SHARE * 2.0, rel=0.02)
    assert raised.extent_threshold / raised.threshold == pytest.approx(0.6)


def test_large_finding_does_not_raise_the_thresholds() -> None:
    lesioned = with_ball(noise(0.5), 4.0)
    assert raise_thresholds(lesioned, SETTINGS, RULE, VOXEL_ML) == SETTINGS
    assert raise_thresholds(lesioned, SETTINGS, Rule(99.0, 100.0), VOXEL_ML).threshold == pytest.approx(4.0)


def test_scan_that_is_one_finding_keeps_its_thresholds() -> None:
    assert raise_thresholds(np.full((4, 8, 8), 3.0, np.float32), SETTINGS, RULE, VOXEL_ML) == SETTINGS


def test_higher_calibrated_thresholds_need_a_smaller_factor() -> None:
    """A site profile raises the thresholds. The scan then raises them to the same value, not by the same factor."""
    profile = scale_thresholds(SETTINGS, 1.2)
    assert raise_thresholds(noise(2.0), profile, RULE, VOXEL_ML).threshold == pytest.approx(SHARE * 2.0, rel=0.02)
    assert raise_thresholds(noise(1.5), profile, RULE, VOXEL_ML) == profile
