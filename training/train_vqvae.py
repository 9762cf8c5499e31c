"""Stage 1: train the VQ-VAE, which encodes slices to latents and decodes them."""

import math

import numpy as np
import torch
from monai.networks.nets.vqvae import VQVAE
from torch.nn import functional as F

from training.config import Config, parse_config
from training.data import UINT16_MAX, HealthySlices, UInt16Array
from training.loop import Batches, Run, TrainingOptions, device, load_start_weights
from training.networks import build_vqvae

VALIDATION_SLICES = 256
VALIDATE_EVERY = 250


def encode_flat(vqvae: VQVAE, x: torch.Tensor) -> torch.Tensor:
    """Return the encoder's outputs as a list of vectors, (N*h*w, C)."""
    z = vqvae.encoder(x)
    flat: torch.Tensor = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    return flat


@torch.no_grad()
def set_codes(vqvae: VQVAE, codes: torch.Tensor, vectors: torch.Tensor) -> None:
    """Set codebook entries (indices) to encoder outputs, with the mean use of all codes."""
    quantiser = vqvae.quantizer.quantizer
    mean_use = max(float(quantiser.ema_cluster_size.mean()), 1.0)
    quantiser.embedding.weight.data[codes] = vectors
    quantiser.ema_cluster_size.data[codes] = mean_use
    quantiser.ema_w.data[codes] = vectors * mean_use


@torch.no_grad()
def restart_dead_codes(vqvae: VQVAE, x: torch.Tensor, below: float, rng: np.random.Generator) -> int:
    """Move rarely used codes to encoder outputs of the batch and return their number.

    MONAI's quantiser has no such step, and without it most codes end unused.
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
    """Return the L1 reconstruction error on validation slices and the number of codes in use."""
    vqvae.eval()
    chosen = np.linspace(0, len(stack) - 1, VALIDATION_SLICES).astype(int)
    x = torch.from_numpy(stack[chosen].astype(np.float32) / UINT16_MAX)[:, None].to(device())
    used: set[int] = set()
    error = foreground_error = 0.0
    for part in x.split(32):
        indices = vqvae.index_quantize(part)
        used.update(indices.unique().tolist())
        difference = (vqvae.decode_samples(indices) - part).abs()
        error += float(difference.mean()) * len(part) / len(x)
        foreground_error += float(difference[part > 0].mean()) * len(part) / len(x)
    vqvae.train()
    return {"val_l1": error, "val_l1_foreground": foreground_error, "val_codes_used": float(len(used))}


def train(config: Config, healthy: HealthySlices | None = None, options: TrainingOptions = TrainingOptions()) -> int:  # noqa: B008 - frozen
    """Train the VQ-VAE of a configuration, or resume its training, and return the number of completed steps."""
    c = config.vqvae_settings
    torch.manual_seed(config.seed)
    healthy = healthy or HealthySlices.of(config)
    batches = Batches(healthy.train, c.batch, config.seed, config.augmentation)
    vqvae = build_vqvae(config).to(device(), memory_format=torch.channels_last)
    load_start_weights(config, c.warm_start, "vqvae", vqvae, steps=c.steps)
    optimiser = torch.optim.AdamW(vqvae.parameters(), lr=c.learning_rate, weight_decay=1e-4)
    progress = options.progress(c.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * progress(step))) + 1e-3
    )
    run = Run("vqvae", config, healthy.data, {"vqvae": vqvae}, optimiser, schedule)

    def step_fn(step: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.to(memory_format=torch.channels_last)
        rng = np.random.default_rng([config.seed, 2, step])
        if step == 0 and not c.warm_start:
            codes = torch.arange(c.codes)
            vectors = encode_flat(vqvae, x)
            set_codes(vqvae, codes, vectors[torch.from_numpy(rng.choice(len(vectors), len(codes)))])
        reconstruction, quantisation = vqvae(x)
        l1 = F.l1_loss(reconstruction, x)
        optimiser.zero_grad(set_to_none=True)
        (l1 + quantisation).backward()
        optimiser.step()
        schedule.step()
        # No restarts in the last tenth of the run, so that the codebook converges.
        if step % c.dead_code_interval == 0 and progress(step) < 0.9:
            restart_dead_codes(vqvae, x, c.dead_code_fraction, rng)
        return {"l1": l1.detach(), "commitment": quantisation.detach()}

    return run.train(
        batches, progress, step_fn, lambda: validate(vqvae, healthy.validation), VALIDATE_EVERY, options.workers
    )


if __name__ == "__main__":
    train(parse_config(__doc__))
