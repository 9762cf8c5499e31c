"""What is usual in all six scores is usual; what is not in one, is not."""

import numpy as np
import pytest

pytest.importorskip("torch")

from training.experiments.fusion import FUSED, TWO_SIDED, Fused, Scale

pytestmark = pytest.mark.training

PICTURES = 4000


@pytest.fixture(scope="module")
def healthy() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: np.exp(rng.normal(-i, 0.1 * (i + 1), PICTURES)).astype(np.float32) for i, name in enumerate(TWO_SIDED)
    }


def test_a_scale_is_the_spread_of_the_logarithm_whatever_a_few_show() -> None:
    values = np.exp(np.random.default_rng(1).normal(-2, 0.3, PICTURES)).astype(np.float32)
    values[:40] *= 1000  # one in a hundred
    scale = Scale.of(values)
    assert scale.median == pytest.approx(-2, abs=0.03)
    assert scale.above == pytest.approx(0.3, abs=0.03)
    assert scale.below == pytest.approx(0.3, abs=0.03)


def test_the_most_unusual_score_decides(healthy: dict[str, np.ndarray]) -> None:
    fused = Fused.of(healthy)
    names = list(TWO_SIDED)
    for i, name in enumerate(names):
        sd = 0.1 * (i + 1)
        picture = {n: np.exp(np.array([-k, -k, -k], np.float32)) for k, n in enumerate(names)}
        picture[name] = np.exp(np.array([-i, -i + 5 * sd, -i - 5 * sd], np.float32))
        usual, high, low = fused(picture)[FUSED]
        assert usual < 0.2
        assert high == pytest.approx(5, abs=0.4)
        # Too little of something is unusual of a picture as a whole alone.
        assert low == pytest.approx(5, abs=0.4) if TWO_SIDED[name] else low < 0.2


def test_a_picture_beyond_all_healthy_ones_is_still_ranked(healthy: dict[str, np.ndarray]) -> None:
    fused = Fused.of(healthy)
    far = {n: np.array([10.0, 100.0, np.nan], np.float32) for n in TWO_SIDED}
    ten, hundred, none = fused(far)[FUSED]
    assert fused(healthy)[FUSED].max() < ten < hundred < none == np.inf


def test_a_residual_of_nothing_is_no_finding() -> None:
    values = np.abs(np.random.default_rng(2).normal(1, 0.2, PICTURES)).astype(np.float32)
    values[:10] = 0
    scale = Scale.of(values)
    assert np.array_equal(scale(np.zeros(2, np.float32), two_sided=False), [0, 0])
