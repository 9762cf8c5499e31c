"""The latents that the denoiser learns from, encoded once from augmented slices."""

import hashlib
import json

import numpy as np
import numpy.typing as npt
import torch
from monai.networks.nets.vqvae import VQVAE
from torch.nn import functional as F
from tqdm import tqdm

from training.coarse import add_coarse_noise
from training.config import Config
from training.data import Batches, UInt16Array, cached_slices
from training.loop import device, load_modules
from training.networks import build_vqvae

# A cell whose mean intensity is above this holds tissue: what the latents are scaled by.
TISSUE = 0.1
STATISTICS_SLICES = 1024
BATCH = 64


def load_vqvae(config: Config) -> tuple[VQVAE, dict[str, torch.Tensor], dict[str, str]]:
    """The trained VQ-VAE, the shift and scale of its latents (1, C, 1, 1), and its provenance."""
    vqvae = build_vqvae(config).to(device())
    provenance = load_modules(config, "vqvae", {"vqvae": vqvae})
    vqvae.requires_grad_(False)
    return vqvae, latent_statistics(config, vqvae), provenance


@torch.no_grad()
def latent_statistics(config: Config, vqvae: VQVAE) -> dict[str, torch.Tensor]:
    """Mean and standard deviation of each channel over tissue latents of training slices."""
    stack = cached_slices(config, "train")
    chosen = np.linspace(0, len(stack) - 1, STATISTICS_SLICES).astype(int)
    batches = Batches(stack[chosen], BATCH, config.seed, None)
    tissue = []
    for step in range(len(chosen) // BATCH):
        x = batches(step).to(device())
        z = vqvae.encoder(x)  # (B, C, h, w)
        inside = F.adaptive_avg_pool2d(x, z.shape[2:])[:, 0] > TISSUE
        tissue.append(z.permute(0, 2, 3, 1)[inside])
    vectors = torch.cat(tissue)
    return {"shift": vectors.mean(0)[None, :, None, None], "scale": vectors.std(0)[None, :, None, None]}


@torch.no_grad()
def cached_latents(config: Config, part: str, passes: int) -> npt.NDArray[np.float16]:
    """z0 of every slice of a part, healthy and with coarse noise, (N * passes, 2, C, h, w).

    Each pass augments the slices anew; `passes` = 0 takes them as they are, once.
    """
    vqvae, latent, provenance = load_vqvae(config)
    decides = [provenance, config.augmentation.model_dump(), config.coarse_noise.model_dump(), part, passes]
    key = json.dumps(decides)
    path = config.run_folder / "cache" / f"latents-{part}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
    if not path.exists():
        np.save(path, _encode(config, vqvae, latent, cached_slices(config, part), passes))
    latents: npt.NDArray[np.float16] = np.load(path, mmap_mode="r")
    return latents


def _encode(
    config: Config, vqvae: VQVAE, latent: dict[str, torch.Tensor], stack: UInt16Array, passes: int
) -> npt.NDArray[np.float16]:
    # Another stream of the seed than the VQ-VAE's batches: their augmentations differ.
    batches = Batches(stack, BATCH, config.seed + 1, config.augmentation if passes else None)
    parts = []
    for step in tqdm(range(max(passes, 1) * (len(stack) // BATCH)), desc="encode", unit="batch"):
        x = batches(step)
        rng = np.random.default_rng([config.seed, 5, step])
        coarse = torch.from_numpy(add_coarse_noise(x.numpy(), config.coarse_noise, rng))
        pair = [(vqvae.encoder(v.to(device())) - latent["shift"]) / latent["scale"] for v in (x, coarse)]
        parts.append(torch.stack(pair, dim=1).cpu().numpy().astype(np.float16))
    return np.concatenate(parts)
