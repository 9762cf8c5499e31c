"""Denoising autoencoder in pixel space (Kascenas et al. 2022), a baseline.

`python -m training.experiments.denoising_autoencoder CONFIG` trains it, or continues its training.

The autoencoder learns to remove the same patches of coarse noise as the denoiser of the bundle (decision 8), from the
same slices. It has no latents and no diffusion: it runs once per view. The difference between a slice and its output is
the anomaly map. `training.experiments.method_comparison` compares it with the bundle.

A. Kascenas, N. Pugeault, A. O'Neil: Denoising autoencoders for unsupervised anomaly detection in brain MRI, MIDL 2022.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from training.augment import add_coarse_noise
from training.config import Config, PixelLatentsConfig, parse_config
from training.data import UINT16_MAX, HealthySlices
from training.loop import Batches, Run, TrainingOptions, device, load_modules, make_generator
from training.networks import build_denoiser, matching_denoiser_weights

NAME = "denoising-autoencoder"
STEPS, BATCH, LEARNING_RATE = 4000, 16, 6e-4
VALIDATIONS, VALIDATION_SLICES = 10, 256
# Pixels are folded into channels, as in pixel latents.
FOLD = 2
# Random streams of the coarse noise in training and in validation, in addition to the seed of the configuration.
NOISE_STREAM, VALIDATION_STREAM = 7, 8


class DenoisingAutoencoder(nn.Module):
    """U-Net of the size of the bundle's denoiser that predicts what must be added to a slice to make it healthy."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        folded = {"vqvae": None, "pixel_latents": PixelLatentsConfig(fold=FOLD)}
        self.unet = build_denoiser(config.model_copy(update=folded))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the healthy version (N, 1, H, W) of slices (N, 1, H, W) in [0, 1]."""
        # The network of the denoiser expects a time step. Here it is constant.
        t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        change = F.pixel_shuffle(self.unet(F.pixel_unshuffle(x, FOLD), t), FOLD)
        # The background is known and stays 0.
        restored: torch.Tensor = (x + change).clamp(0, 1) * (x > 0)
        return restored


def denoising_loss(network: nn.Module, x: torch.Tensor, config: Config, rng: torch.Generator) -> torch.Tensor:
    """Return the mean squared error over the foreground after coarse noise is removed from slices (N, 1, H, W)."""
    error: torch.Tensor = network(add_coarse_noise(x, config.coarse_noise, rng)) - x
    return error.square().sum() / (x > 0).sum()


def train(config: Config, healthy: HealthySlices | None = None, steps: int = STEPS) -> int:
    """Train the autoencoder, or continue its training, and return the number of completed steps.

    The training starts from the inner layers of the denoiser of the bundle, if there is one, because that was trained
    on the same scans.
    """
    torch.manual_seed(config.seed)
    healthy = healthy or HealthySlices.of(config)
    network = DenoisingAutoencoder(config).to(device()).train()
    if config.bundle_folder.is_dir():
        network.unet.load_state_dict(matching_denoiser_weights(config.bundle_folder, network.unet))
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    progress = TrainingOptions().progress(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * progress(step))) + 1e-3
    )
    run = Run(
        NAME, config, f"{healthy.data} {steps} {BATCH} {LEARNING_RATE}", {"network": network}, optimiser, schedule
    )

    def step_fn(step: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = denoising_loss(network, x, config, make_generator(config.seed, NOISE_STREAM, step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def validate() -> dict[str, float]:
        some = healthy.validation[:: max(1, len(healthy.validation) // VALIDATION_SLICES)]
        x = torch.from_numpy(some.astype(np.float32) / UINT16_MAX)[:, None].to(device())
        rng = make_generator(config.seed, VALIDATION_STREAM)
        return {"val_loss": float(np.mean([float(denoising_loss(network, p, config, rng)) for p in x.split(BATCH)]))}

    batches = Batches(healthy.train, BATCH, config.seed, config.augmentation)
    return run.train(batches, progress, step_fn, validate, max(1, steps // VALIDATIONS))


def load(config: Config, steps: int = STEPS) -> nn.Module:
    """Load the trained autoencoder.

    Raises
    ------
    SystemExit
        Its training is missing or not finished.
    """
    network = DenoisingAutoencoder(config)
    step = load_modules(config, NAME, {"network": network})["step"]
    if int(step) < steps:
        raise SystemExit(f"{NAME} of {config.name} was trained for {step} of {steps} steps. Run the training again.")
    return network.to(device()).eval().requires_grad_(requires_grad=False)


if __name__ == "__main__":
    train(parse_config(__doc__))
