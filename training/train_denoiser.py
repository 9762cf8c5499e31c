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
from training.config import Config
from training.data import data_hash
from training.latents import cached_latents
from training.loop import Run, device
from training.networks import build_denoiser
from training.splits import load_split

VALIDATION_LATENTS = 192
VALIDATE_EVERY = 500
# The validation loss is reported by noise level: a mean over all hides where it improves.
LEVELS = (50, 200, 400, 500, 600, 900)
# There, also with coarse noise: low enough to see the surroundings clearly.
HEALING_LEVELS = (100, 250)
# A squared error of the noise outside e^-10 .. e^4 is none that a trained network expects.
LOG_EXPECTED = (-10.0, 4.0)


def draw_times(config: Config, count: int, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
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


def squared_error(output: torch.Tensor, epsilon: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of the predicted noise, mean over channels, and the logarithm of the expected one, (N, h, w)."""
    predicted, log_expected = output[:, :-1], output[:, -1]
    return (predicted - epsilon).square().mean(1), log_expected.clamp(*LOG_EXPECTED)


def train(config: Config) -> None:
    """Train, or go on training, the denoiser of a configuration."""
    torch.manual_seed(config.seed)
    z_train = cached_latents(config, "train", config.denoiser.passes)
    z_held_out = cached_latents(config, "validation", 0)
    schedule = Schedule.linear(config.schedule.steps, config.schedule.beta_start, config.schedule.beta_end)
    denoiser = build_denoiser(config).to(device()).to(memory_format=torch.channels_last)
    averaged = AveragedModel(denoiser, avg_fn=warming_average(config.denoiser.ema_decay))
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=config.denoiser.learning_rate, weight_decay=1e-4)
    warmup, steps = config.denoiser.warmup, config.denoiser.steps
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))) + 1e-3),
    )
    split = load_split(config.data.splits)
    modules = {"denoiser": denoiser, "averaged": averaged}
    run = Run("denoiser", config, data_hash(config, split.train), modules, optimiser, rate)

    def noisy(
        pair: npt.NDArray[np.float16], t: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        clean, coarse = pair.astype(np.float32).swapaxes(0, 1)
        white = rng.standard_normal(clean.shape, dtype=np.float32)
        z_t = schedule.diffuse(coarse, white, t)
        # All that separates z_t from the healthy latent is noise: its white part and its coarse one.
        alpha_bar = schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
        epsilon = (z_t - np.sqrt(alpha_bar) * clean) / np.sqrt(1 - alpha_bar)
        z = torch.from_numpy(z_t).to(device(), memory_format=torch.channels_last)
        return z, torch.from_numpy(t).to(device()), torch.from_numpy(epsilon.astype(np.float32)).to(device())

    def step_fn(step: int) -> dict[str, float]:
        rng = np.random.default_rng([config.seed, 3, step])
        chosen = np.sort(rng.choice(len(z_train), config.denoiser.batch, replace=False))
        z_t, t, epsilon = noisy(z_train[chosen], draw_times(config, len(chosen), rng), rng)
        error, log_expected = squared_error(denoiser(z_t, t), epsilon)
        loss = error.mean()
        surprise = (log_expected + error.detach() / log_expected.exp()).mean()
        optimiser.zero_grad(set_to_none=True)
        (loss + config.denoiser.error_weight * surprise).backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimiser.step()
        rate.step()
        averaged.update_parameters(denoiser)
        return {"mse": float(loss.detach()), "nll": float(surprise.detach())}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        averaged.eval()
        chosen = np.linspace(0, len(z_held_out) - 1, VALIDATION_LATENTS).astype(int)
        pairs = z_held_out[chosen]
        healthy = np.stack([pairs[:, 0], pairs[:, 0]], axis=1)
        losses = {}
        for level, kind, z0 in [(t, "", healthy) for t in LEVELS] + [(t, "_coarse", pairs) for t in HEALING_LEVELS]:
            rng = np.random.default_rng([config.seed, 4, level])
            z_t, t, epsilon = noisy(z0, np.full(len(chosen), level), rng)
            predicted = torch.cat([averaged(a, b) for a, b in zip(z_t.split(32), t.split(32), strict=True)])
            error, log_expected = squared_error(predicted, epsilon)
            losses[f"val_mse{kind}_t{level}"] = float(error.mean())
            losses[f"val_relative{kind}_t{level}"] = float((error / log_expected.exp()).mean())
        return losses

    run.train(steps, step_fn, validate, VALIDATE_EVERY)


if __name__ == "__main__":
    train(Config.load(Path(sys.argv[1])))
