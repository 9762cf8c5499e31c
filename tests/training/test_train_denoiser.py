"""Tests of the training targets of the denoiser, its loss weights and its averaged weights."""

from pathlib import Path
from typing import cast

import pytest

torch = pytest.importorskip("torch")
from torch import Generator, Tensor, nn  # noqa: E402

from training.config import ROOT, Config  # noqa: E402
from training.networks import Encoder  # noqa: E402
from training.train_denoiser import (  # noqa: E402
    alpha_bars,
    diffuse_pair,
    draw_times,
    encode_pair,
    loss_weight,
    warmup_average,
)

pytestmark = pytest.mark.training

CONFIG = Config.load(Path(ROOT, "training", "configs", "t1.toml"))
ALPHA_BAR = alpha_bars(CONFIG)[torch.tensor([0, 10, 230, 999])]


def rng(seed: int) -> Generator:
    """Return a seeded generator."""
    return Generator().manual_seed(seed)


def test_epsilon_recovers_the_healthy_latent() -> None:
    clean = torch.randn(4, 3, 6, 5, generator=rng(3))
    z_t, epsilon = diffuse_pair(clean, clean + 0.5, ALPHA_BAR, rng(4))
    recovered = (z_t - (1 - ALPHA_BAR).sqrt() * epsilon) / ALPHA_BAR.sqrt()
    torch.testing.assert_close(recovered[:3], clean[:3], atol=1e-4, rtol=0)
    # Without the change of the latent times sqrt(SNR), the remaining noise is white.
    white = epsilon - (ALPHA_BAR / (1 - ALPHA_BAR)).sqrt() * 0.5
    assert float(white.mean()) == pytest.approx(0, abs=0.15)
    assert float(white.std()) == pytest.approx(1, abs=0.1)


def test_epsilon_without_coarse_noise_is_white() -> None:
    clean = torch.zeros(4, 3, 6, 5)
    _, epsilon = diffuse_pair(clean, clean, ALPHA_BAR, rng(4))
    torch.testing.assert_close(epsilon, torch.randn(clean.shape, generator=rng(4)), atol=1e-5, rtol=0)


def test_loss_weight_is_min_snr() -> None:
    snr = ALPHA_BAR / (1 - ALPHA_BAR)
    torch.testing.assert_close(loss_weight(ALPHA_BAR, 5.0) * snr, snr.clamp(max=5.0))


def test_most_time_steps_are_low_and_all_are_drawn() -> None:
    d = CONFIG.denoiser
    drawn = draw_times(CONFIG, 20_000, rng(5))
    expected = d.low_noise_probability + (1 - d.low_noise_probability) * d.low_noise_below / CONFIG.schedule.steps
    assert float((drawn < d.low_noise_below).float().mean()) == pytest.approx(expected, abs=0.01)
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == CONFIG.schedule.steps - 1


def test_average_forgets_its_initial_value() -> None:
    """With a constant decay of 0.999, 37 % would remain after a thousand steps."""
    average, mean = warmup_average(0.999), torch.tensor([1.0])
    for count in range(1, 1001):
        average([mean], [torch.tensor([0.0])], count)
    assert float(mean) < 0.01


@pytest.mark.parametrize(("probability", "encoded"), [(0.0, 2), (1.0, 4)])
def test_slices_without_patches_are_encoded_once(probability: float, encoded: int) -> None:
    sizes: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return x

    noise = CONFIG.coarse_noise.model_copy(update={"probability": probability})
    config = CONFIG.model_copy(update={"coarse_noise": noise})
    x = torch.full((2, 1, 32, 32), 0.5)
    clean, coarse = encode_pair(cast("Encoder", Counting()), x, config, rng(1))
    assert sizes == [encoded]
    torch.testing.assert_close(clean, x)
    assert bool((coarse != clean).any()) == bool(probability)
