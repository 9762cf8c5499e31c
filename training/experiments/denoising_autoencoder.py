"""Denoising autoencoder in pixel space (Kascenas et al. 2022), the baseline without diffusion and without latents.

It learns to remove the same patches of coarse noise as Counterpart's denoiser (decision 8), from the same slices. It
runs once per view, and the difference between a slice and its output is the anomaly map.
"""

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import nn
from torch.nn import functional as F

from training.augment import add_coarse_noise
from training.config import Config
from training.networks import Weights

# Pixels are folded into channels, so that the U-Net works on as many positions as the denoiser does on latents.
FOLD = 2


class DenoisingAutoencoder(nn.Module):
    """U-Net of the size of the bundle's denoiser that predicts what must be added to a slice to make it healthy."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c = config.denoiser
        self.unet = DiffusionModelUNet(
            spatial_dims=2,
            in_channels=FOLD**2,
            out_channels=FOLD**2,
            num_res_blocks=c.residual_blocks,
            channels=c.channels,
            attention_levels=c.attention_levels,
            num_head_channels=c.head_channels,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the healthy version (N, 1, H, W) of slices (N, 1, H, W) in [0, 1]."""
        # The network of the denoiser expects a time step. Here it is constant.
        t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        change = F.pixel_shuffle(self.unet(F.pixel_unshuffle(x, FOLD), t), FOLD)
        # The background is known and stays 0.
        restored: torch.Tensor = (x + change).clamp(0, 1) * (x > 0)
        return restored

    def start_from_denoiser(self, weights: Weights) -> None:
        """Take the layers of a trained denoiser, except the first and the last one, which work on latents."""
        own = self.unet.state_dict()
        self.unet.load_state_dict({k: weights[k] if weights[k].shape == w.shape else w for k, w in own.items()})


def denoising_loss(network: nn.Module, x: torch.Tensor, config: Config, rng: torch.Generator) -> torch.Tensor:
    """Return the mean squared error over the foreground after coarse noise is removed from slices (N, 1, H, W)."""
    error: torch.Tensor = network(add_coarse_noise(x, config.coarse_noise, rng)) - x
    return error.square().sum() / (x > 0).sum()
