"""Coarse noise: what the forward process adds beside white noise, so that the model learns to take a patch away.

White noise of one latent hides nothing that is larger than a latent: the model sees through it, and
keeps a lesion of some size because its surroundings agree. Noise with structure over several
scales is what anomaly detection by diffusion wants (AnoDDPM, Wyatt et al. 2022), and coarse noise
alone teaches a plain denoising network to heal (Kascenas et al. 2022). Here it lies in patches, in
the image, before encoding; the target stays the healthy latent. No lesion's shape is known to it.
"""

import numpy as np
from scipy import ndimage

from app.pipeline.prepare import BoolArray
from app.volume import FloatArray
from training.config import CoarseNoiseConfig

# The strength varies between these shares of what was drawn.
LEVELS = (0.2, 1.8)


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
        head = image > 0
        if rng.random() < config.share and head.any():
            np.add(image, _patches(head, config, rng), out=image, where=head)
    return np.clip(changed, 0, 1)


def _patches(head: BoolArray, config: CoarseNoiseConfig, rng: np.random.Generator) -> FloatArray:
    """How much one slice is changed, (H, W): two sets of patches, each brighter or darker."""
    where = _smooth(head.shape, np.exp(rng.uniform(*np.log(config.patch_pixels))), rng)
    level = 1 + config.level_sd * _smooth(head.shape, rng.uniform(*config.level_pixels), rng)
    change = np.zeros(head.shape, dtype=np.float32)
    for field in (where, -where):
        covered = field > np.quantile(field[head], 1 - rng.uniform(*config.covered))
        # Even on a logarithmic scale: faint patches are the hard ones.
        strength = np.exp(rng.uniform(*np.log(config.strength))) * rng.choice((-1.0, 1.0))
        soft = ndimage.gaussian_filter(covered.astype(np.float32), rng.uniform(*config.edge_pixels))
        change += np.float32(strength) * soft
    return np.asarray(change * np.clip(level, *LEVELS), dtype=np.float32)


def _smooth(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> FloatArray:
    """A smooth Gaussian field of unit variance, (H, W)."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return np.asarray((field - field.mean()) / field.std(), dtype=np.float32)
