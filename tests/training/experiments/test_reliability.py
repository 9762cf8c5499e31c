"""Calibration of a score as a probability."""

import numpy as np
import pytest

pytest.importorskip("torch")

from training.experiments.image_level import HEALTHY, NEAR, Images, ScoredImages
from training.experiments.reliability import BINS, FAR, Calibration, bin_images, evaluate, evaluate_bins

pytestmark = pytest.mark.training

PICTURES = 6000


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw scores, truths and the true probability."""
    rng = np.random.default_rng(seed)
    score = rng.uniform(0.1, 3, PICTURES)
    probability = 1 / (1 + np.exp(3 - 2 * score))
    return score.astype(np.float32), rng.random(PICTURES) < probability, probability


def test_calibration_is_monotone_and_finds_the_probability() -> None:
    score, ill, _ = drawn(0)
    calibration = Calibration.fit(score, ill)
    fresh, _, probability = drawn(1)
    assert np.abs(calibration.predict(fresh) - probability).mean() < 0.025
    curve = calibration.predict(np.linspace(0, 9, 200).astype(np.float32))
    assert (np.diff(curve) >= 0).all()
    assert (
        calibration.predict(np.array([np.nan], np.float32))
        == calibration.predict(np.array([np.inf], np.float32))
        == curve.max()
    )


def test_errors_follow_their_definitions() -> None:
    score, ill, probability = drawn(2)
    subjects = [str(i % 30) for i in range(PICTURES)]
    found = evaluate_bins(bin_images(score, probability, ill, subjects), 0.5)
    assert found.brier.value == pytest.approx(((probability - ill) ** 2).mean())
    assert found.brier.low < found.brier.value < found.brier.high
    assert found.calibration_error.value < 0.02
    assert [b.images for b in found.bins] == [PICTURES // BINS] * BINS
    inside = [b.observed.low - 0.01 <= b.predicted <= b.observed.high + 0.01 for b in found.bins]
    assert sum(inside) >= BINS - 1
    off = evaluate_bins(bin_images(score, probability + 0.1, ill, subjects), 0.5)
    assert off.calibration_error.value == pytest.approx(0.1, abs=0.02)


def test_near_and_far_images_are_evaluated_separately() -> None:
    def scored(kind: str, values: np.ndarray) -> ScoredImages:
        n = len(values)
        images = Images(kind, np.zeros((n, 1, 2, 2), np.float32), np.ones((n, 2, 2), bool), [kind] * n)
        return ScoredImages(images, {"KL": values.astype(np.float32)}, 0.1)

    score, ill, _ = drawn(3)
    validation = [scored(HEALTHY, score[~ill]), scored(NEAR, score[ill])]
    again, ill_again, _ = drawn(4)
    test = [scored(HEALTHY, again[~ill_again]), scored(NEAR, again[ill_again]), scored("Hand", np.full(400, 9.0))]
    found = evaluate("KL", validation, test).kinds
    assert found[NEAR].fitted_share == pytest.approx(ill.mean())
    assert found[NEAR].calibration_error.value < 0.03
    assert found[FAR].share == pytest.approx(400 / (400 + (~ill_again).sum()))
    assert sum(b.images for b in found[FAR].bins) == 400 + (~ill_again).sum()
