"""Coarse noise: what the forward process adds beside white noise, so that the model learns to take a patch away.

White noise of one latent hides nothing that is larger than a latent: the model sees through it, and
keeps a lesion of some size because its surroundings agree. Noise with structure over several
scales is what anomaly detection by diffusion wants (AnoDDPM, Wyatt et al. 2022), and coarse noise
alone teaches a plain denoising network to heal (Kascenas et al. 2022). Here it lies in patches, in
the image, before encoding; the target stays the healthy latent. No lesion's shape or intensity is
known to it.
"""

import numpy as np
from scipy import ndimage

from app.volume import FloatArray
from training.config import CoarseNoiseConfig


def add_coarse_noise(x: FloatArray, config: CoarseNoiseConfig, rng: np.random.Generator) -> FloatArray:
    """Slices with patches of coarse noise on their foreground.

    Parameters
    ----------
    x : (B, 1, H, W) ndarray in [0, 1]

    Returns
    -------
    (B, 1, H, W) ndarray in [0, 1]
        A share of the slices is left as it is.
    """
    changed = x.copy()
    for image in changed[:, 0]:
        if rng.random() < config.share:
            patches = _patches(image.shape, config, rng)
            np.add(image, patches, out=image, where=image > 0)
    return np.clip(changed, 0, 1)


def _patches(shape: tuple[int, ...], config: CoarseNoiseConfig, rng: np.random.Generator) -> FloatArray:
    """Where and how much one slice is changed, (H, W)."""
    low, high = np.log(config.patch_pixels)
    where = _smooth(shape, np.exp(rng.uniform(low, high)), rng)
    covered = rng.uniform(*config.covered)
    mask = (where > np.quantile(where, 1 - covered)).astype(np.float32)
    # The level varies from patch to patch, and less within one.
    level = _smooth(shape, rng.uniform(*config.level_pixels), rng)
    strength = rng.uniform(*config.strength) * rng.choice((-1.0, 1.0))
    edge = rng.uniform(*config.edge_pixels)
    soft = ndimage.gaussian_filter(mask, edge)
    return np.asarray(strength * np.clip(level + rng.uniform(0, 1), -1.5, 1.5) * soft, dtype=np.float32)


def _smooth(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> FloatArray:
    """A smooth Gaussian field of unit variance, (H, W)."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return np.asarray((field - field.mean()) / field.std(), dtype=np.float32)
