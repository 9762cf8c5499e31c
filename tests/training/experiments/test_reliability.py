"""A score that is a probability is found to be one, and one that is not, by how much."""

import numpy as np
import pytest

pytest.importorskip("torch")

from training.experiments.imagewise import HEALTHY, NEAR, Pictures, Scored
from training.experiments.reliability import BINS, FOREIGN, Binned, Calibration, judge

pytestmark = pytest.mark.training

PICTURES = 6000


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, what is true of them, and the true probability."""
    rng = np.random.default_rng(seed)
    score = rng.uniform(0.1, 3, PICTURES)
    probability = 1 / (1 + np.exp(3 - 2 * score))
    return score.astype(np.float32), rng.random(PICTURES) < probability, probability


def test_the_calibration_finds_the_probability_and_never_falls() -> None:
    score, ill, _ = drawn(0)
    calibration = Calibration.fit(score, ill)
    fresh, _, probability = drawn(1)
    assert np.abs(calibration(fresh) - probability).mean() < 0.025
    ladder = calibration(np.linspace(0, 9, 200).astype(np.float32))
    assert (np.diff(ladder) >= 0).all()
    assert calibration(np.array([np.nan], np.float32)) == calibration(np.array([np.inf], np.float32)) == ladder.max()


def test_errors_are_those_of_their_definitions() -> None:
    score, ill, probability = drawn(2)
    subjects = [str(i % 30) for i in range(PICTURES)]
    found = Binned.of(score, probability, ill, subjects).judged()
    assert found["brier"]["value"] == pytest.approx(((probability - ill) ** 2).mean())
    assert found["brier"]["low"] < found["brier"]["value"] < found["brier"]["high"]
    assert found["ece"]["value"] < 0.02
    assert [b["pictures"] for b in found["bins"]] == [PICTURES // BINS] * BINS
    inside = [b["observed"]["low"] - 0.01 <= b["predicted"] <= b["observed"]["high"] + 0.01 for b in found["bins"]]
    assert sum(inside) >= BINS - 1
    # Always a tenth too sure.
    off = Binned.of(score, probability + 0.1, ill, subjects).judged()
    assert off["ece"]["value"] == pytest.approx(0.1, abs=0.02)


def test_near_and_foreign_pictures_are_judged_apart() -> None:
    def scored(kind: str, values: np.ndarray) -> Scored:
        n = len(values)
        pictures = Pictures(kind, np.zeros((n, 1, 2, 2), np.float32), np.ones((n, 2, 2), bool), [kind] * n)
        return Scored(pictures, {"KL": values.astype(np.float32)}, 0.1)

    score, ill, _ = drawn(3)
    validation = [scored(HEALTHY, score[~ill]), scored(NEAR, score[ill])]
    again, ill_again, _ = drawn(4)
    test = [scored(HEALTHY, again[~ill_again]), scored(NEAR, again[ill_again]), scored("Hand", np.full(400, 9.0))]
    found = judge("KL", validation, test)["kinds"]
    assert found[NEAR]["share_fitted"] == pytest.approx(ill.mean())
    assert found[NEAR]["ece"]["value"] < 0.03
    assert found[FOREIGN]["share"] == pytest.approx(400 / (400 + (~ill_again).sum()))
    assert sum(b["pictures"] for b in found[FOREIGN]["bins"]) == 400 + (~ill_again).sum()
