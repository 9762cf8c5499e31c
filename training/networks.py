"""The two networks, from MONAI, and the three callables that serving knows them by."""

from collections.abc import Mapping

import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from monai.networks.nets.vqvae import VQVAE
from torch import nn

from training.config import Config


def build_vqvae(config: Config) -> VQVAE:
    """VQ-VAE that halves rows and columns once for each entry of `channels`."""
    c = config.vqvae
    levels = len(c.channels)
    return VQVAE(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=c.channels,
        num_res_layers=c.residual_layers,
        num_res_channels=c.channels,
        downsample_parameters=((2, 4, 1, 1),) * levels,
        upsample_parameters=((2, 4, 1, 1, 0),) * levels,
        num_embeddings=c.codes,
        embedding_dim=c.embedding_dim,
        decay=c.decay,
        commitment_cost=c.commitment,
        ddp_sync=False,
    )


def build_denoiser(config: Config) -> DiffusionModelUNet:
    """U-Net that predicts the noise in z_t: (N, C, h, w) and t (N,) -> epsilon (N, C, h, w)."""
    c = config.denoiser
    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=config.vqvae.embedding_dim,
        out_channels=config.vqvae.embedding_dim,
        num_res_blocks=c.residual_blocks,
        channels=c.channels,
        attention_levels=c.attention,
        num_head_channels=c.head_channels,
    )


class Encode(nn.Module):
    """x (N, 1, H, W) -> z0 (N, C, h, w): before quantisation, shifted and scaled to unit variance."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, vqvae: VQVAE, latent: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.encoder = vqvae.encoder
        self.register_buffer("shift", latent["shift"])
        self.register_buffer("scale", latent["scale"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self.encoder(x)
        return (z - self.shift) / self.scale


class Decode(nn.Module):
    """z0 (N, C, h, w) -> x (N, 1, H, W) in [0, 1]; quantises first."""

    shift: torch.Tensor
    scale: torch.Tensor
    codes: torch.Tensor

    def __init__(self, vqvae: VQVAE, latent: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.decoder = vqvae.decoder
        self.register_buffer("codes", vqvae.quantizer.quantizer.embedding.weight.detach().clone())
        self.register_buffer("shift", latent["shift"])
        self.register_buffer("scale", latent["scale"])

    def nearest(self, z0: torch.Tensor) -> torch.Tensor:
        """The code of each latent, (N, h, w)."""
        z = z0 * self.scale + self.shift
        flat = z.permute(0, 2, 3, 1)  # (N, h, w, C)
        # |z - e|^2 without the |z|^2 that is the same for every code.
        distance = (self.codes**2).sum(1) - 2 * flat @ self.codes.T  # (N, h, w, codes)
        return distance.argmin(-1)

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (N, h, w) -> x (N, 1, H, W) in [0, 1]."""
        x: torch.Tensor = self.decoder(self.codes[codes].permute(0, 3, 1, 2))
        return x.clamp(0, 1)

    def forward(self, z0: torch.Tensor) -> torch.Tensor:
        return self.decode_codes(self.nearest(z0))
