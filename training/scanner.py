"""The same head from another scanner: how sharp and how noisy its image is, not what it shows.

A model that has seen one scanner alone takes the next one's noise for something it does not know, and the
gate refuses whole scans for it.
"""

import numpy as np
from scipy import ndimage

from app.volume import FloatArray
from training.config import ScannerConfig

# What sharpening adds is finer than this, in pixels.
DETAIL_PIXELS = 0.8


def another_scanner(x: FloatArray, config: ScannerConfig, rng: np.random.Generator) -> FloatArray:
    """Slices of one head as another scanner might show them: noisier, and smoother or sharper.

    Parameters
    ----------
    x : (N, H, W) ndarray in [0, 1]
        The background, 0, stays what it is: preparation cuts it out.

    Returns
    -------
    (N, H, W) ndarray in [0, 1]
    """
    noise = rng.uniform(0, config.noise) * rng.standard_normal(x.shape, dtype=np.float32)
    amount = rng.uniform(-1, 1)
    # Scanners smooth their noise along with the image, and sharpen it too.
    noisy = x + np.where(x > 0, noise.astype(np.float32), np.float32(0))
    if amount < 0:
        changed = _gaussian(noisy, -amount * config.blur_pixels)
    else:
        changed = noisy + np.float32(amount * config.sharpen) * (noisy - _gaussian(noisy, DETAIL_PIXELS))
    return np.where(x > 0, np.clip(changed, 0, 1), np.float32(0))


def _gaussian(x: FloatArray, sigma: float) -> FloatArray:
    """Gaussian within each slice, of the foreground alone: the background must not darken its edge."""
    inside = (x > 0).astype(np.float32)
    weight = ndimage.gaussian_filter(inside, (0, sigma, sigma))
    return np.asarray(ndimage.gaussian_filter(x, (0, sigma, sigma)) / np.maximum(weight, np.float32(1e-6)), np.float32)
