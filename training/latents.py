"""Encoder and decoder between the training stages: of the trained VQ-VAE, or of pixels as latents."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from training.config import Config
from training.data import UInt16Array, cached_slices
from training.loop import Batches, device, load_modules
from training.networks import Decoder, Encoder, PixelDecoder, build_vqvae

# A latent whose cell has a mean intensity above this shows tissue. Only these determine the scale of the latents.
TISSUE_LEVEL = 0.1
STATISTICS_SLICES = 1024
STATISTICS_BATCH = 64


def load_coders(
    config: Config, stack: UInt16Array | None = None
) -> tuple[Encoder, Decoder | PixelDecoder, dict[str, str]]:
    """Load the encoder and the decoder of the latents: of the trained VQ-VAE, or of pixels.

    Parameters
    ----------
    config : Config
    stack : (N, H, W) ndarray of uint16, optional
        Training slices. The cached ones by default.

    Returns
    -------
    encoder : Encoder
    decoder : Decoder or PixelDecoder
    provenance : dict of str to str
        See `training.loop.load_modules`. Pixels are not trained: their step is 0.
    """
    stack = cached_slices(config, "train") if stack is None else stack
    if config.pixel_latents is not None:
        unfold = nn.PixelUnshuffle(config.pixel_latents.fold)
        latent = latent_statistics(config, unfold, stack)
        pixels = PixelDecoder(config.pixel_latents.fold, latent)
        return Encoder(unfold, latent), pixels, {"step": "0"}
    vqvae = build_vqvae(config).to(device())
    provenance = load_modules(config, "vqvae", {"vqvae": vqvae})
    vqvae.requires_grad_(False)
    latent = latent_statistics(config, vqvae.encoder, stack)
    return Encoder(vqvae.encoder, latent), Decoder(vqvae, latent), provenance


@torch.no_grad()
def latent_statistics(config: Config, encoder: nn.Module, stack: UInt16Array) -> dict[str, torch.Tensor]:
    """Return mean (`shift`) and standard deviation (`scale`) of each channel over tissue latents of training slices."""
    chosen = np.linspace(0, len(stack) - 1, STATISTICS_SLICES).astype(int)
    batches = Batches(stack[chosen], STATISTICS_BATCH, config.seed, None)
    tissue = []
    for step in range(len(chosen) // STATISTICS_BATCH):
        x = batches[step].to(device())
        z = encoder(x)  # (B, C, h, w)
        inside = F.adaptive_avg_pool2d(x, z.shape[2:])[:, 0] > TISSUE_LEVEL
        tissue.append(z.permute(0, 2, 3, 1)[inside])
    vectors = torch.cat(tissue)
    return {"shift": vectors.mean(0)[None, :, None, None], "scale": vectors.std(0)[None, :, None, None]}
