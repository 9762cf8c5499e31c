"""Stage 2: the denoising diffusion model on the latents of healthy slices."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.optim.swa_utils import AveragedModel

from app.pipeline.schedule import Schedule
from app.volume import FloatArray
from training.config import Config
from training.data import UINT16_MAX, Batches, cached_slices, data_hash
from training.latents import encode_pair, load_vqvae
from training.loop import Run, device, start_from
from training.networks import build_denoiser
from training.splits import load_split

VALIDATION_SLICES = 192
VALIDATE_EVERY = 500
# The validation loss is reported by noise level: a mean over all hides where it improves.
LEVELS = (10, 50, 200, 400, 600, 900)
# There, also with coarse noise: low enough to see the surroundings clearly.
HEALING_LEVELS = (10, 50)


def draw_times(config: Config, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Time steps of a batch: mostly the levels that detection uses, the others so that none is unknown."""
    d = config.denoiser
    focused = rng.random(count) < d.focus_share
    return np.where(focused, rng.integers(0, d.focus_below, count), rng.integers(0, config.schedule.steps, count))


def warming_average(decay: float) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | int], torch.Tensor]:
    """Exponential moving average that forgets the initial weights: its memory grows with the run.

    With a constant decay of 0.999 a run of 3,600 steps still ends with 2.7 % of them.
    """

    def average(mean: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | int) -> torch.Tensor:
        now = min(decay, (1 + float(seen)) / (10 + float(seen)))
        return torch.lerp(mean, value, 1 - now)

    return average


def diffuse_pair(
    clean: FloatArray, coarse: FloatArray, t: npt.NDArray[np.int64], schedule: Schedule, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """z_t from latents with coarse noise, and all that separates it from the healthy ones as noise.

    Parameters
    ----------
    clean, coarse : (B, C, h, w) ndarray
    t : (B,) ndarray

    Returns
    -------
    z_t, epsilon : (B, C, h, w) ndarray
        z_t = sqrt(alpha_bar) clean + sqrt(1 - alpha_bar) epsilon.
    """
    white = rng.standard_normal(clean.shape, dtype=np.float32)
    z_t = schedule.diffuse(coarse, white, t)
    alpha_bar = schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
    epsilon = (z_t - np.sqrt(alpha_bar) * clean) / np.sqrt(1 - alpha_bar)
    return z_t, np.asarray(epsilon, dtype=np.float32)


def loss_weight(t: npt.NDArray[np.int64], schedule: Schedule, snr_limit: float) -> FloatArray:
    """Weight of a squared error of the noise, (B, 1, 1, 1): min(SNR, limit) on the latent's own error.

    Hang et al. 2023 (Min-SNR). Unweighed, coarse noise at the lowest levels would be almost all of
    the loss: there, epsilon is the change of the latent times sqrt(SNR).
    """
    alpha_bar = schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
    return np.asarray(np.minimum(1, snr_limit * (1 - alpha_bar) / alpha_bar), dtype=np.float32)


def train(config: Config) -> None:
    """Train, or go on training, the denoiser of a configuration."""
    torch.manual_seed(config.seed)
    vqvae, latent, _ = load_vqvae(config)
    # Another stream of the seed than the VQ-VAE's batches: their augmentations differ.
    batches = Batches(cached_slices(config, "train"), config.denoiser.batch, config.seed + 1, config.augmentation)
    held_out = cached_slices(config, "validation")
    schedule = Schedule.linear(config.schedule.steps, config.schedule.beta_start, config.schedule.beta_end)
    denoiser = build_denoiser(config).to(device()).to(memory_format=torch.channels_last)
    start_from(config, config.denoiser.warm_start, "denoiser", denoiser, steps=config.denoiser.steps)
    averaged = AveragedModel(denoiser, avg_fn=warming_average(config.denoiser.ema_decay))
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=config.denoiser.learning_rate, weight_decay=1e-4)
    warmup, steps = config.denoiser.warmup, config.denoiser.steps
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1))) + 1e-3),
    )
    split = load_split(config.data.splits)
    modules = {"denoiser": denoiser, "averaged": averaged}
    run = Run("denoiser", config, data_hash(config, split.train), modules, optimiser, rate)

    def place(array: FloatArray) -> torch.Tensor:
        return torch.from_numpy(array).to(device(), memory_format=torch.channels_last)

    def step_fn(step: int) -> dict[str, float]:
        rng = np.random.default_rng([config.seed, 3, step])
        clean, coarse = encode_pair(vqvae, latent, batches(step), config, rng)
        t = draw_times(config, len(clean), rng)
        z_t, epsilon = diffuse_pair(clean, coarse, t, schedule, rng)
        error = (denoiser(place(z_t), torch.from_numpy(t).to(device())) - place(epsilon)).square()
        loss = (error * torch.from_numpy(loss_weight(t, schedule, config.denoiser.snr_limit)).to(device())).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimiser.step()
        rate.step()
        averaged.update_parameters(denoiser)
        return {"loss": float(loss.detach())}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        averaged.eval()
        chosen = np.linspace(0, len(held_out) - 1, VALIDATION_SLICES).astype(int)
        x = torch.from_numpy(held_out[chosen].astype(np.float32) / UINT16_MAX)[:, None]
        clean, coarse = encode_pair(vqvae, latent, x, config, np.random.default_rng([config.seed, 5]))
        losses = {}
        for level, kind, z0 in [(t, "", clean) for t in LEVELS] + [(t, "_coarse", coarse) for t in HEALING_LEVELS]:
            t = np.full(len(chosen), level)
            z_t, epsilon = diffuse_pair(clean, z0, t, schedule, np.random.default_rng([config.seed, 4, level]))
            parts = zip(place(z_t).split(32), torch.from_numpy(t).to(device()).split(32), strict=True)
            predicted = torch.cat([averaged(a, b) for a, b in parts])
            losses[f"val_mse{kind}_t{level}"] = float((predicted - place(epsilon)).square().mean())
        return losses

    run.train(steps, step_fn, validate, VALIDATE_EVERY)


if __name__ == "__main__":
    train(Config.load(Path(sys.argv[1])))
