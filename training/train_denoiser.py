"""Stage 2: train the denoising network of the diffusion model on the latents of healthy slices."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from app.pipeline.diffusion import Schedule
from training.augment import add_coarse_noise
from training.config import Config, parse_config
from training.data import UINT16_MAX, HealthySlices
from training.latents import load_coders
from training.loop import Batches, Run, TrainingOptions, device, load_start_weights, make_generator
from training.networks import Encoder, build_denoiser

VALIDATION_SLICES = 192
VALIDATE_EVERY = 500
# Time steps at which the validation loss is reported. A mean over all levels would not show at which level it improves.
LEVELS = (10, 50, 200, 400, 600, 900)
# Low noise levels, at which the loss with coarse noise is reported too.
COARSE_LEVELS = (10, 50)


def draw_times(config: Config, count: int, rng: torch.Generator) -> torch.Tensor:
    """Draw the time steps of a batch (B,): mostly the low ones that detection uses, else any."""
    d = config.denoiser
    is_low = torch.rand(count, generator=rng, device=rng.device) < d.low_noise_probability
    low, any_step = (
        torch.randint(end, (count,), generator=rng, device=rng.device)
        for end in (d.low_noise_below, config.schedule.steps)
    )
    return torch.where(is_low, low, any_step)


Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


def warmup_average(decay: float) -> Callable[[Tensors, Tensors, torch.Tensor | int], None]:
    """Return an update of an exponential moving average whose decay grows with the number of steps.

    With a constant decay of 0.999, the average after 3,600 steps still has 2.7 % of the initial weights.
    """

    def update(means: Tensors, values: Tensors, count: torch.Tensor | int) -> None:
        steps = float(count)
        current = min(decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(means, values, 1 - current)

    return update


def alpha_bars(config: Config) -> torch.Tensor:
    """Return alpha_bar of each time step, (T, 1, 1, 1)."""
    alpha_bar = Schedule.from_settings(config.schedule).alpha_bar
    return torch.from_numpy(alpha_bar).to(device(), torch.float32).reshape(-1, 1, 1, 1)


@torch.no_grad()
def encode_pair(
    encoder: Encoder, x: torch.Tensor, config: Config, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode healthy slices (B, 1, H, W), and the same slices with coarse noise, both (B, C, h, w)."""
    if not config.coarse_noise.probability:
        clean: torch.Tensor = encoder(x.to(memory_format=torch.channels_last))
        return clean, clean
    both = torch.cat([x, add_coarse_noise(x, config.coarse_noise, rng)]).to(memory_format=torch.channels_last)
    z0: torch.Tensor = encoder(both)
    return z0[: len(x)], z0[len(x) :]


def diffuse_pair(
    clean: torch.Tensor, coarse: torch.Tensor, alpha_bar: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Diffuse latents with coarse noise. Epsilon is the whole difference from the healthy latents.

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


def loss_weight(alpha_bar: torch.Tensor, min_snr_gamma: float) -> torch.Tensor:
    """Return the weight of the squared error of the noise, (B, 1, 1, 1): min(SNR, gamma) / SNR.

    Min-SNR weighting (Hang et al. 2023). Without it, coarse noise at the lowest levels would dominate the loss: epsilon
    there is the change of the latent times sqrt(SNR).
    """
    return (min_snr_gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1)


def capture_cuda_graphs(network: nn.Module, examples: tuple[torch.Tensor, ...]) -> nn.Module:
    """Make the network run its training steps as CUDA graphs in bfloat16 on a GPU. On a CPU, nothing changes.

    Without graphs, nine tenths of a step are spent on launching the two thousand kernels of this network.
    """
    if device().type != "cuda":
        return network
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        torch.cuda.make_graphed_callables(network, examples)  # changes the network in place
    return network


def train(config: Config, healthy: HealthySlices | None = None, options: TrainingOptions = TrainingOptions()) -> int:  # noqa: B008 - frozen
    """Train the denoiser of a configuration, or resume its training, and return the number of completed steps."""
    torch.manual_seed(config.seed)
    healthy = healthy or HealthySlices.of(config)
    encoder, _, _ = load_coders(config, healthy.train)
    # Another seed than that of the VQ-VAE's batches, so that the augmentations differ.
    batches = Batches(healthy.train, config.denoiser.batch, config.seed + 1, config.augmentation)
    levels = alpha_bars(config)
    denoiser = build_denoiser(config).to(device()).to(memory_format=torch.channels_last)
    load_start_weights(config, config.denoiser.warm_start, "denoiser", denoiser, steps=config.denoiser.steps)
    averaged = AveragedModel(denoiser, multi_avg_fn=warmup_average(config.denoiser.ema_decay))
    on_gpu = device().type == "cuda"
    optimiser = torch.optim.AdamW(
        denoiser.parameters(), lr=config.denoiser.learning_rate, weight_decay=1e-4, fused=on_gpu or None
    )
    warmup, progress = config.denoiser.warmup_steps, options.progress(config.denoiser.steps)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress(step))) + 1e-3),
    )
    modules = {"denoiser": denoiser, "averaged": averaged}
    run = Run("denoiser", config, healthy.data, modules, optimiser, rate)

    example = torch.zeros((config.denoiser.batch, *config.latent_shape), device=device())
    example = example.contiguous(memory_format=torch.channels_last)
    denoiser.train()
    captured = capture_cuda_graphs(denoiser, (example, torch.zeros(len(example), dtype=torch.int64, device=device())))

    def step_fn(step: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rng = make_generator(config.seed, 3, step)
        clean, coarse = encode_pair(encoder, x, config, rng)
        t = draw_times(config, len(clean), rng)
        alpha_bar = levels[t]
        z_t, epsilon = diffuse_pair(clean, coarse, alpha_bar, rng)
        predicted = captured(z_t.contiguous(memory_format=torch.channels_last), t)
        loss = ((predicted - epsilon).square() * loss_weight(alpha_bar, config.denoiser.min_snr_gamma)).mean()
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
        chosen = np.linspace(0, len(healthy.validation) - 1, VALIDATION_SLICES).astype(int)
        x = torch.from_numpy(healthy.validation[chosen].astype(np.float32) / UINT16_MAX)[:, None].to(device())
        clean, coarse = encode_pair(encoder, x, config, make_generator(config.seed, 5))
        losses = {}
        for level, kind, z0 in [(t, "", clean) for t in LEVELS] + [(t, "_coarse", coarse) for t in COARSE_LEVELS]:
            t = torch.full((len(chosen),), level, device=device())
            z_t, epsilon = diffuse_pair(clean, z0, levels[t], make_generator(config.seed, 4, level))
            predicted = torch.cat([averaged(a, b) for a, b in zip(z_t.split(32), t.split(32), strict=True)])
            losses[f"val_mse{kind}_t{level}"] = float((predicted - epsilon).square().mean())
        return losses

    return run.train(batches, progress, step_fn, validate, VALIDATE_EVERY, options.workers)


if __name__ == "__main__":
    train(parse_config(__doc__))
