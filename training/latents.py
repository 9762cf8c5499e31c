"""The latents that the denoiser learns from."""

import numpy as np
import torch
from monai.networks.nets.vqvae import VQVAE
from torch.nn import functional as F

from training.coarse import add_coarse_noise
from training.config import Config
from training.data import Batches, UInt16Array, cached_slices
from training.loop import device, load_modules
from training.networks import build_vqvae

# A cell whose mean intensity is above this holds tissue: what the latents are scaled by.
TISSUE = 0.1
STATISTICS_SLICES = 1024
BATCH = 64


def load_vqvae(
    config: Config, stack: UInt16Array | None = None
) -> tuple[VQVAE, dict[str, torch.Tensor], dict[str, str]]:
    """The trained VQ-VAE, the shift and scale of its latents (1, C, 1, 1), and its provenance.

    Parameters
    ----------
    config : Config
    stack : (N, H, W) ndarray, optional
        The training slices; else from the cache.
    """
    vqvae = build_vqvae(config).to(device())
    provenance = load_modules(config, "vqvae", {"vqvae": vqvae})
    vqvae.requires_grad_(False)
    stack = cached_slices(config, "train") if stack is None else stack
    return vqvae, latent_statistics(config, vqvae, stack), provenance


def latent_size(config: Config) -> tuple[int, int]:
    """Rows and columns of latents."""
    rows, columns = (side // config.downsampling for side in config.preprocessing.shape)
    return rows, columns


@torch.no_grad()
def latent_statistics(config: Config, vqvae: VQVAE, stack: UInt16Array) -> dict[str, torch.Tensor]:
    """Mean and standard deviation of each channel over tissue latents of training slices."""
    chosen = np.linspace(0, len(stack) - 1, STATISTICS_SLICES).astype(int)
    batches = Batches(stack[chosen], BATCH, config.seed, None)
    tissue = []
    for step in range(len(chosen) // BATCH):
        x = batches[step].to(device())
        z = vqvae.encoder(x)  # (B, C, h, w)
        inside = F.adaptive_avg_pool2d(x, z.shape[2:])[:, 0] > TISSUE
        tissue.append(z.permute(0, 2, 3, 1)[inside])
    vectors = torch.cat(tissue)
    return {"shift": vectors.mean(0)[None, :, None, None], "scale": vectors.std(0)[None, :, None, None]}


@torch.no_grad()
def encode_pair(
    vqvae: VQVAE, latent: dict[str, torch.Tensor], x: torch.Tensor, config: Config, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """z0 of healthy slices (B, 1, H, W), and of the same slices with coarse noise; each (B, C, h, w)."""
    both = torch.cat([x, add_coarse_noise(x, config.coarse_noise, rng)]).to(memory_format=torch.channels_last)
    z0: torch.Tensor = (vqvae.encoder(both) - latent["shift"]) / latent["scale"]
    return z0[: len(x)], z0[len(x) :]
