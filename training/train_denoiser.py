"""Stage 2: the denoising diffusion model on the latents of healthy slices."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from app.pipeline.diffusion import Schedule
from training.config import Config
from training.data import UINT16_MAX, Batches, HealthySlices
from training.latents import encode_pair, latent_size, load_vqvae
from training.loop import Limits, Run, device, generator, start_from
from training.networks import build_denoiser

VALIDATION_SLICES = 192
VALIDATE_EVERY = 500
# The validation loss is reported by noise level: a mean over all hides where it improves.
LEVELS = (10, 50, 200, 400, 600, 900)
# There, also with coarse noise: low enough to see the surroundings clearly.
HEALING_LEVELS = (10, 50)


def draw_times(config: Config, count: int, rng: torch.Generator) -> torch.Tensor:
    """Time steps of a batch (B,): mostly the levels that detection uses, the others so that none is unknown."""
    d = config.denoiser
    focused = torch.rand(count, generator=rng, device=rng.device) < d.focus_share
    low, every = (
        torch.randint(end, (count,), generator=rng, device=rng.device) for end in (d.focus_below, config.schedule.steps)
    )
    return torch.where(focused, low, every)


Weights = tuple[torch.Tensor, ...] | list[torch.Tensor]


def warming_average(decay: float) -> Callable[[Weights, Weights, torch.Tensor | int], None]:
    """Exponential moving average that forgets the initial weights: its memory grows with the run.

    With a constant decay of 0.999 a run of 3,600 steps still ends with 2.7 % of them.
    """

    def average(means: Weights, values: Weights, seen: torch.Tensor | int) -> None:
        steps = float(seen)
        now = min(decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(means, values, 1 - now)

    return average


def alpha_bars(config: Config) -> torch.Tensor:
    """alpha_bar of each t, (T, 1, 1, 1)."""
    schedule = Schedule.linear(config.schedule.steps, config.schedule.beta_start, config.schedule.beta_end)
    return torch.from_numpy(schedule.alpha_bar).to(device(), torch.float32).reshape(-1, 1, 1, 1)


def diffuse_pair(
    clean: torch.Tensor, coarse: torch.Tensor, alpha_bar: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """z_t from latents with coarse noise, and all that separates it from the healthy ones as noise.

    Parameters
    ----------
    clean, coarse : (B, C, h, w) tensor
    alpha_bar : (B, 1, 1, 1) tensor

    Returns
    -------
    z_t, epsilon : (B, C, h, w) tensor
        z_t = sqrt(alpha_bar) clean + sqrt(1 - alpha_bar) epsilon.
    """
    white = torch.randn(clean.shape, generator=rng, device=rng.device)
    noise = (1 - alpha_bar).sqrt()
    z_t = alpha_bar.sqrt() * coarse + noise * white
    return z_t, (z_t - alpha_bar.sqrt() * clean) / noise


def loss_weight(alpha_bar: torch.Tensor, snr_limit: float) -> torch.Tensor:
    """Weight of a squared error of the noise, (B, 1, 1, 1): min(SNR, limit) on the latent's own error.

    Hang et al. 2023 (Min-SNR). Unweighed, coarse noise at the lowest levels would be almost all of
    the loss: there, epsilon is the change of the latent times sqrt(SNR).
    """
    return (snr_limit * (1 - alpha_bar) / alpha_bar).clamp(max=1)


def graphed(network: nn.Module, examples: tuple[torch.Tensor, ...]) -> nn.Module:
    """The network as it learns from batches like these: on a GPU as CUDA graphs, in bfloat16 with float32 sums.

    Of one step of this network, a GPU would spend nine tenths waiting for the next of its two thousand kernels.
    """
    if device().type != "cuda":
        return network
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        torch.cuda.make_graphed_callables(network, examples)  # and the network runs them from now on
    return network


def train(config: Config, healthy: HealthySlices | None = None, limits: Limits = Limits()) -> int:  # noqa: B008 - frozen
    """Train, or go on training, the denoiser of a configuration; how many steps it has learnt."""
    torch.manual_seed(config.seed)
    healthy = healthy or HealthySlices.of(config)
    held_out = healthy.validation
    vqvae, latent, _ = load_vqvae(config, healthy.train)
    # Another stream of the seed than the VQ-VAE's batches: their augmentations differ.
    batches = Batches(healthy.train, config.denoiser.batch, config.seed + 1, config.augmentation)
    levels = alpha_bars(config)
    denoiser = build_denoiser(config).to(device()).to(memory_format=torch.channels_last)
    start_from(config, config.denoiser.warm_start, "denoiser", denoiser, steps=config.denoiser.steps)
    averaged = AveragedModel(denoiser, multi_avg_fn=warming_average(config.denoiser.ema_decay))
    on_gpu = device().type == "cuda"
    optimiser = torch.optim.AdamW(
        denoiser.parameters(), lr=config.denoiser.learning_rate, weight_decay=1e-4, fused=on_gpu or None
    )
    warmup, progress = config.denoiser.warmup, limits.progress(config.denoiser.steps)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress(step))) + 1e-3),
    )
    modules = {"denoiser": denoiser, "averaged": averaged}
    run = Run("denoiser", config, healthy.data, modules, optimiser, rate)

    shape = (config.denoiser.batch, config.vqvae.embedding_dim, *latent_size(config))
    example = torch.zeros(shape, device=device()).contiguous(memory_format=torch.channels_last)
    denoiser.train()
    learning = graphed(denoiser, (example, torch.zeros(len(example), dtype=torch.int64, device=device())))

    def step_fn(step: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rng = generator(config.seed, 3, step)
        clean, coarse = encode_pair(vqvae, latent, x, config, rng)
        t = draw_times(config, len(clean), rng)
        alpha_bar = levels[t]
        z_t, epsilon = diffuse_pair(clean, coarse, alpha_bar, rng)
        predicted = learning(z_t.contiguous(memory_format=torch.channels_last), t)
        loss = ((predicted - epsilon).square() * loss_weight(alpha_bar, config.denoiser.snr_limit)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimiser.step()
        rate.step()
        averaged.update_parameters(denoiser)
        return {"loss": loss.detach()}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        averaged.eval()
        chosen = np.linspace(0, len(held_out) - 1, VALIDATION_SLICES).astype(int)
        x = torch.from_numpy(held_out[chosen].astype(np.float32) / UINT16_MAX)[:, None].to(device())
        clean, coarse = encode_pair(vqvae, latent, x, config, generator(config.seed, 5))
        losses = {}
        for level, kind, z0 in [(t, "", clean) for t in LEVELS] + [(t, "_coarse", coarse) for t in HEALING_LEVELS]:
            t = torch.full((len(chosen),), level, device=device())
            z_t, epsilon = diffuse_pair(clean, z0, levels[t], generator(config.seed, 4, level))
            predicted = torch.cat([averaged(a, b) for a, b in zip(z_t.split(32), t.split(32), strict=True)])
            losses[f"val_mse{kind}_t{level}"] = float((predicted - epsilon).square().mean())
        return losses

    return run.train(batches, progress, step_fn, validate, VALIDATE_EVERY, limits.workers)


if __name__ == "__main__":
    train(Config.load(Path(sys.argv[1])))
