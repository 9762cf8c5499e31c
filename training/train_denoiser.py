"""Stage 2: the denoising diffusion model on the latents of healthy slices."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
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
        z0: np.ndarray[tuple[int, ...], np.dtype[np.float16]],
        t: np.ndarray[tuple[int], np.dtype[np.int64]],
        rng: np.random.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        clean = z0.astype(np.float32)
        epsilon = rng.standard_normal(clean.shape, dtype=np.float32)
        z_t = torch.from_numpy(schedule.diffuse(clean, epsilon, t)).to(device(), memory_format=torch.channels_last)
        return z_t, torch.from_numpy(t).to(device()), torch.from_numpy(epsilon).to(device())

    def step_fn(step: int) -> dict[str, float]:
        rng = np.random.default_rng([config.seed, 3, step])
        chosen = np.sort(rng.choice(len(z_train), config.denoiser.batch, replace=False))
        z_t, t, epsilon = noisy(z_train[chosen], draw_times(config, len(chosen), rng), rng)
        loss = F.mse_loss(denoiser(z_t, t), epsilon)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimiser.step()
        rate.step()
        averaged.update_parameters(denoiser)
        return {"mse": float(loss.detach())}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        averaged.eval()
        chosen = np.linspace(0, len(z_held_out) - 1, VALIDATION_LATENTS).astype(int)
        losses = {}
        for level in LEVELS:
            rng = np.random.default_rng([config.seed, 4, level])
            z_t, t, epsilon = noisy(z_held_out[chosen], np.full(len(chosen), level), rng)
            predicted = torch.cat([averaged(a, b) for a, b in zip(z_t.split(32), t.split(32), strict=True)])
            losses[f"val_mse_t{level}"] = float(F.mse_loss(predicted, epsilon))
        return losses

    run.train(steps, step_fn, validate, VALIDATE_EVERY)


if __name__ == "__main__":
    train(Config.load(Path(sys.argv[1])))
