"""Exact networks: the optimal denoiser of a Gaussian prior is known in closed form.

For independent latents z0 ~ N(mean, sd^2), the best prediction of the noise in
z_t = sqrt(a) z0 + sqrt(1 - a) eps is E[eps | z_t] = sqrt(1 - a) (z_t - sqrt(a) mean) / (a sd^2 + 1 - a).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.pipeline.diffusion import Networks, Schedule
from app.volume import FloatArray, IntArray

# The encoder averages the pixels of a cell above this level, so that a cell on the edge of the head counts as tissue.
# The mean is shifted, scaled and signed, one sign a channel.
TISSUE_LEVEL = 0.3
SHIFT, SCALE = 0.70, 0.04
SIGNS = (1.0, -1.0, 1.0)
# Prior of the latents of the tissue of the phantom, per channel.
MEANS = (0.1, -0.1, 0.1)
SDS = (0.9, 0.9, 0.9)
CELL = 4


@dataclass(frozen=True, eq=False)
class GaussianDenoiser:
    """Optimal denoiser for independent latents N(mean, sd^2).

    Attributes
    ----------
    schedule : Schedule
    mean, sd : ndarray
        Broadcastable to (N, C, h, w).
    """

    schedule: Schedule
    mean: npt.NDArray[np.float64]
    sd: npt.NDArray[np.float64]

    def __call__(self, z_t: FloatArray, t: IntArray) -> FloatArray:
        """Return the expected noise in z_t, (N, C, h, w)."""
        a = self.schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
        epsilon = np.sqrt(1 - a) * (z_t - np.sqrt(a) * self.mean) / (a * self.sd**2 + 1 - a)
        return np.asarray(epsilon, dtype=np.float32)

    def marginal(self, t: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return mean and standard deviation of z_t."""
        a = self.schedule.alpha_bar_at(t)
        return np.sqrt(a) * self.mean, np.sqrt(a * self.sd**2 + 1 - a)


def encode(x: FloatArray) -> FloatArray:
    """Encode (N, 1, H, W) -> (N, C, H / 4, W / 4)."""
    n, _, height, width = x.shape
    cells = x.reshape(n, 1, height // CELL, CELL, width // CELL, CELL)
    bright = cells > TISSUE_LEVEL
    tissue = (cells * bright).sum(axis=(3, 5)) / np.maximum(bright.sum(axis=(3, 5)), 1)
    return np.asarray((tissue - SHIFT) / SCALE * _channels(SIGNS), dtype=np.float32)


def decode(z0: FloatArray) -> FloatArray:
    """Decode (N, C, h, w) -> (N, 1, 4 h, 4 w)."""
    tissue = (z0 * _channels(SIGNS)).mean(axis=1, keepdims=True) * SCALE + SHIFT
    return np.asarray(np.clip(tissue.repeat(CELL, axis=2).repeat(CELL, axis=3), 0, 1), dtype=np.float32)


def gaussian_networks(schedule: Schedule) -> Networks:
    """Return the exact networks for slices of the phantom."""
    return Networks(encode, GaussianDenoiser(schedule, _channels(MEANS), _channels(SDS)), decode)


def _channels(values: tuple[float, ...]) -> npt.NDArray[np.float64]:
    return np.array(values).reshape(1, -1, 1, 1)
