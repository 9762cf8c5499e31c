"""Stage 1: the VQ-VAE that turns slices into latents and back."""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from monai.networks.nets.vqvae import VQVAE
from torch.nn import functional as F

from training.config import Config
from training.data import UINT16_MAX, Batches, HealthySlices, UInt16Array
from training.loop import Limits, Run, device, start_from
from training.networks import build_vqvae

VALIDATION_SLICES = 256
VALIDATE_EVERY = 250


def encode_flat(vqvae: VQVAE, x: torch.Tensor) -> torch.Tensor:
    """Encoder outputs as a list of vectors, (N*h*w, C)."""
    z = vqvae.encoder(x)
    flat: torch.Tensor = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    return flat


@torch.no_grad()
def set_codes(vqvae: VQVAE, codes: torch.Tensor, vectors: torch.Tensor) -> None:
    """Put codebook entries (indices) at some encoder outputs, as if used averagely."""
    quantiser = vqvae.quantizer.quantizer
    average = max(float(quantiser.ema_cluster_size.mean()), 1.0)
    quantiser.embedding.weight.data[codes] = vectors
    quantiser.ema_cluster_size.data[codes] = average
    quantiser.ema_w.data[codes] = vectors * average


@torch.no_grad()
def restart_dead_codes(vqvae: VQVAE, x: torch.Tensor, below: float, rng: np.random.Generator) -> int:
    """Move codes that are hardly used to encoder outputs of the batch; how many were moved.

    MONAI's quantiser has no such step, and without it most of the book dies.
    """
    use = vqvae.quantizer.quantizer.ema_cluster_size
    dead = torch.nonzero(use < below * use.mean()).flatten()
    if len(dead):
        vectors = encode_flat(vqvae, x)
        chosen = rng.choice(len(vectors), len(dead), replace=len(vectors) < len(dead))
        set_codes(vqvae, dead, vectors[torch.from_numpy(chosen).to(x.device)])
    return len(dead)


@torch.no_grad()
def validate(vqvae: VQVAE, stack: UInt16Array) -> dict[str, float]:
    """Reconstruction error on held-out healthy slices, and how much of the codebook is in use."""
    vqvae.eval()
    chosen = np.linspace(0, len(stack) - 1, VALIDATION_SLICES).astype(int)
    x = torch.from_numpy(stack[chosen].astype(np.float32) / UINT16_MAX)[:, None].to(device())
    used: set[int] = set()
    error = foreground_error = 0.0
    for part in x.split(32):
        indices = vqvae.index_quantize(part)
        used.update(indices.unique().tolist())
        wrong = (vqvae.decode_samples(indices) - part).abs()
        error += float(wrong.mean()) * len(part) / len(x)
        foreground_error += float(wrong[part > 0].mean()) * len(part) / len(x)
    vqvae.train()
    return {"val_l1": error, "val_l1_foreground": foreground_error, "val_codes_used": float(len(used))}


def train(config: Config, healthy: HealthySlices | None = None, limits: Limits = Limits()) -> int:  # noqa: B008 - frozen
    """Train, or go on training, the VQ-VAE of a configuration; how many steps it has learnt."""
    torch.manual_seed(config.seed)
    healthy = healthy or HealthySlices.of(config)
    batches = Batches(healthy.train, config.vqvae.batch, config.seed, config.augmentation)
    vqvae = build_vqvae(config).to(device(), memory_format=torch.channels_last)
    start_from(config, config.vqvae.warm_start, "vqvae", vqvae, steps=config.vqvae.steps)
    optimiser = torch.optim.AdamW(vqvae.parameters(), lr=config.vqvae.learning_rate, weight_decay=1e-4)
    progress = limits.progress(config.vqvae.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * progress(step))) + 1e-3
    )
    run = Run("vqvae", config, healthy.data, {"vqvae": vqvae}, optimiser, schedule)

    def step_fn(step: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.to(memory_format=torch.channels_last)
        rng = np.random.default_rng([config.seed, 2, step])
        if step == 0 and not config.vqvae.warm_start:
            codes = torch.arange(config.vqvae.codes)
            vectors = encode_flat(vqvae, x)
            set_codes(vqvae, codes, vectors[torch.from_numpy(rng.choice(len(vectors), len(codes)))])
        reconstruction, quantisation = vqvae(x)
        l1 = F.l1_loss(reconstruction, x)
        optimiser.zero_grad(set_to_none=True)
        (l1 + quantisation).backward()
        optimiser.step()
        schedule.step()
        # The last tenth of the run settles on the codebook it has.
        if step % config.vqvae.restart_every == 0 and progress(step) < 0.9:
            restart_dead_codes(vqvae, x, config.vqvae.dead_below, rng)
        return {"l1": l1.detach(), "commitment": quantisation.detach()}

    return run.train(
        batches, progress, step_fn, lambda: validate(vqvae, healthy.validation), VALIDATE_EVERY, limits.workers
    )


if __name__ == "__main__":
    train(Config.load(Path(sys.argv[1])))
