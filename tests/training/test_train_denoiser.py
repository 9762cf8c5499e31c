"""What the denoiser learns from: all that separates z_t from the healthy latent, weighed by min-SNR."""

from pathlib import Path

import numpy as np
import pytest

from app.pipeline.schedule import Schedule
from training.config import ROOT, Config
from training.train_denoiser import diffuse_pair, draw_times, loss_weight

CONFIG = Config.load(Path(ROOT, "training", "configs", "t1.toml"))
SCHEDULE = Schedule.linear(1000, 0.0015, 0.0195)
TIMES = np.array([0, 10, 230, 999])


def test_epsilon_leads_from_z_t_back_to_the_healthy_latent() -> None:
    rng = np.random.default_rng(3)
    clean = rng.standard_normal((4, 3, 6, 5), dtype=np.float32)
    coarse = clean + np.float32(0.5)
    z_t, epsilon = diffuse_pair(clean, coarse, TIMES, SCHEDULE, rng)
    alpha_bar = SCHEDULE.alpha_bar[TIMES].reshape(-1, 1, 1, 1)
    healed = (z_t - np.sqrt(1 - alpha_bar) * epsilon) / np.sqrt(alpha_bar)
    np.testing.assert_allclose(healed[:3], clean[:3], atol=1e-4)
    # The coarse part of the noise is the change of the latent times sqrt(SNR), the rest is white.
    white = epsilon - np.sqrt(alpha_bar / (1 - alpha_bar)) * 0.5
    assert white.mean() == pytest.approx(0, abs=0.15)
    assert white.std() == pytest.approx(1, abs=0.1)


def test_latents_without_coarse_noise_have_white_noise_alone() -> None:
    clean = np.zeros((4, 3, 6, 5), np.float32)
    _, epsilon = diffuse_pair(clean, clean, TIMES, SCHEDULE, np.random.default_rng(4))
    white = np.random.default_rng(4).standard_normal(clean.shape, dtype=np.float32)
    np.testing.assert_allclose(epsilon, white, atol=1e-5)


def test_the_weight_of_an_error_of_the_latent_is_the_lesser_of_snr_and_limit() -> None:
    alpha_bar = SCHEDULE.alpha_bar[TIMES]
    snr = alpha_bar / (1 - alpha_bar)
    weight = loss_weight(TIMES, SCHEDULE, 5.0)[:, 0, 0, 0]
    np.testing.assert_allclose(weight * snr, np.minimum(snr, 5.0), rtol=1e-5)


def test_most_times_are_those_that_detection_uses_and_none_is_left_out() -> None:
    d = CONFIG.denoiser
    drawn = draw_times(CONFIG, 20_000, np.random.default_rng(5))
    expected = d.focus_share + (1 - d.focus_share) * d.focus_below / CONFIG.schedule.steps
    assert (drawn < d.focus_below).mean() == pytest.approx(expected, abs=0.01)
    assert drawn.min() == 0
    assert drawn.max() == CONFIG.schedule.steps - 1
