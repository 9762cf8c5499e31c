"""What the denoiser learns from: all that separates z_t from the healthy latent, weighed by min-SNR."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch import Generator  # noqa: E402

from training.config import ROOT, Config  # noqa: E402
from training.train_denoiser import alpha_bars, diffuse_pair, draw_times, loss_weight, warming_average  # noqa: E402

pytestmark = pytest.mark.training

CONFIG = Config.load(Path(ROOT, "training", "configs", "t1.toml"))
ALPHA_BAR = alpha_bars(CONFIG)[torch.tensor([0, 10, 230, 999])]


def rng(seed: int) -> Generator:
    """Random numbers."""
    return Generator().manual_seed(seed)


def test_epsilon_leads_from_z_t_back_to_the_healthy_latent() -> None:
    clean = torch.randn(4, 3, 6, 5, generator=rng(3))
    z_t, epsilon = diffuse_pair(clean, clean + 0.5, ALPHA_BAR, rng(4))
    healed = (z_t - (1 - ALPHA_BAR).sqrt() * epsilon) / ALPHA_BAR.sqrt()
    torch.testing.assert_close(healed[:3], clean[:3], atol=1e-4, rtol=0)
    # The coarse part of the noise is the change of the latent times sqrt(SNR), the rest is white.
    white = epsilon - (ALPHA_BAR / (1 - ALPHA_BAR)).sqrt() * 0.5
    assert float(white.mean()) == pytest.approx(0, abs=0.15)
    assert float(white.std()) == pytest.approx(1, abs=0.1)


def test_latents_without_coarse_noise_have_white_noise_alone() -> None:
    clean = torch.zeros(4, 3, 6, 5)
    _, epsilon = diffuse_pair(clean, clean, ALPHA_BAR, rng(4))
    torch.testing.assert_close(epsilon, torch.randn(clean.shape, generator=rng(4)), atol=1e-5, rtol=0)


def test_the_weight_of_an_error_of_the_latent_is_the_lesser_of_snr_and_limit() -> None:
    snr = ALPHA_BAR / (1 - ALPHA_BAR)
    torch.testing.assert_close(loss_weight(ALPHA_BAR, 5.0) * snr, snr.clamp(max=5.0))


def test_most_times_are_those_that_detection_uses_and_none_is_left_out() -> None:
    d = CONFIG.denoiser
    drawn = draw_times(CONFIG, 20_000, rng(5))
    expected = d.focus_share + (1 - d.focus_share) * d.focus_below / CONFIG.schedule.steps
    assert float((drawn < d.focus_below).float().mean()) == pytest.approx(expected, abs=0.01)
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == CONFIG.schedule.steps - 1


def test_an_average_forgets_where_it_began() -> None:
    """A constant decay of 0.999 would still hold 37 % of it after a thousand steps."""
    average, mean = warming_average(0.999), torch.tensor([1.0])
    for seen in range(1, 1001):
        average([mean], [torch.tensor([0.0])], seen)
    assert float(mean) < 0.01
