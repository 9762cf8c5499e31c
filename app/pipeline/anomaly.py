"""The paper's steps, one function each (Pinaya et al. 2022, arXiv 2206.03461, section 2)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.pipeline.models import Denoise
from app.pipeline.noise import KeyedNoise, Purpose
from app.pipeline.prepare import BoolArray
from app.pipeline.schedule import CLEAN, Schedule
from app.volume import FloatArray

# Masks join over corners too, a lesion that runs diagonally is one lesion; but not over slices,
# which are compared with the model one by one.
IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
IN_PLANE[1] = True


# Pixels: an edge and both of its sides.
CONTRAST_WINDOW = 5

Mean = Literal["arithmetic", "geometric"]

# A foreground latent always weighs more than this in its own neighbourhood.
SMALLEST_WEIGHT = 1e-6


@dataclass(frozen=True)
class Diffusion:
    """A diffusion model at work on one scan.

    Attributes
    ----------
    schedule : Schedule
        Noise levels.
    denoise : Denoise
        The network.
    noise : KeyedNoise
        Every draw.
    """

    schedule: Schedule
    denoise: Denoise
    noise: KeyedNoise


def kl_map(
    z0: FloatArray,
    slices: npt.NDArray[np.int64],
    diffusion: Diffusion,
    timesteps: tuple[int, ...],
    mean: Mean = "arithmetic",
) -> FloatArray:
    """How far the true reverse step lies from the predicted one, in nats.

    Parameters
    ----------
    z0 : (N, C, h, w) ndarray
        Latents.
    slices : (N,) ndarray of int
        Their indices in the stack: keys of the noise.
    timesteps : tuple of int
        S, each one evaluation of the network.
    mean : {"arithmetic", "geometric"}
        Over S. The geometric one (ANDi, arXiv 2312.01904) lets no noise level outweigh the others:
        the weight of L_{t-1} falls by orders of magnitude from small to large t.

    Returns
    -------
    (N, h, w) ndarray
        L_{t-1} = KL(q(z_{t-1} | z_t, z0) || p(z_{t-1} | z_t)), mean over channels and over S.
    """
    total = np.zeros((len(z0), *z0.shape[2:]), dtype=np.float32)
    forward, back = (_log, np.exp) if mean == "geometric" else (np.asarray, np.asarray)
    for t in timesteps:
        epsilon = diffusion.noise(Purpose.KL, slices, t)
        z_t = diffusion.schedule.diffuse(z0, epsilon, t)
        predicted = diffusion.denoise(z_t, np.full(len(z0), t, dtype=np.int64))
        level = diffusion.schedule.kl_weight(t) * ((epsilon - predicted) ** 2).mean(axis=1)  # (N, h, w)
        total += forward(level)
    return np.asarray(back(total / len(timesteps)), dtype=np.float32)


def _log(level: FloatArray) -> FloatArray:
    """Logarithm; of an exact prediction too, which no trained network makes."""
    return np.asarray(np.log(np.maximum(level, np.finfo(np.float32).tiny)), dtype=np.float32)


def smooth_kl(kl: FloatArray, foreground: BoolArray, sigma: tuple[float, float, float]) -> FloatArray:
    """Gaussian over neighbouring foreground latents of the stack, (N, h, w).

    The noise of neighbouring slices is drawn independently and a lesion spans several of them:
    what they agree on stands out.

    Parameters
    ----------
    sigma : tuple of float
        Standard deviation in slices, rows and columns of latents.
    """
    if not any(sigma):
        return kl
    inside = foreground.astype(np.float32)
    weight = ndimage.gaussian_filter(inside, sigma)
    total = ndimage.gaussian_filter(kl * inside, sigma)
    return np.asarray(np.where(foreground, total / np.maximum(weight, SMALLEST_WEIGHT), kl), dtype=np.float32)


def latent_foreground(foreground: BoolArray, downsampling: int) -> BoolArray:
    """Latents of which at least half the pixels are foreground, (N, H, W) -> (N, h, w)."""
    n, height, width = foreground.shape
    f = downsampling
    cells = foreground.reshape(n, height // f, f, width // f, f)
    half: BoolArray = cells.mean(axis=(2, 4)) >= 0.5
    return half


def latent_mask(kl: FloatArray, foreground: BoolArray, threshold: float, min_component: int, grow: int) -> BoolArray:
    """Which latents the reverse process may change, (N, h, w).

    Foreground latents above the threshold, without connected components of fewer than
    `min_component` latents, grown by `grow` latents inside the foreground.
    """
    mask = (kl > threshold) & foreground
    if min_component > 1:
        # The structure has one layer: slices are not neighbours of each other here.
        labels, count = ndimage.label(mask, structure=IN_PLANE)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        sizes[0] = 0
        mask = sizes[labels] >= min_component
    if grow:
        mask = ndimage.binary_dilation(mask, structure=IN_PLANE, iterations=grow, mask=foreground)
    return mask


def inpaint(
    z0: FloatArray,
    mask: BoolArray,
    slices: npt.NDArray[np.int64],
    diffusion: Diffusion,
    timesteps: tuple[int, ...],
) -> FloatArray:
    """Diffuse half-way, and reverse with only the masked latents free to change.

    Parameters
    ----------
    z0 : (N, C, h, w) ndarray
    mask : (N, h, w) ndarray of bool
        True where the counterpart may differ.
    timesteps : tuple of int
        Descending times of a DDIM sub-sequence; the last step goes to z0.

    Returns
    -------
    (N, C, h, w) ndarray
        The counterpart's latents; unmasked ones are those of z0, bit for bit.
    """
    m = mask[:, None]
    schedule, noise = diffusion.schedule, diffusion.noise
    z = schedule.diffuse(z0, noise(Purpose.START, slices, timesteps[0]), timesteps[0])
    for t, t_next in zip(timesteps, (*timesteps[1:], CLEAN), strict=True):
        predicted = diffusion.denoise(z, np.full(len(z), t, dtype=np.int64))
        free = schedule.ddim_step(z, predicted, t, t_next)
        known = z0 if t_next == CLEAN else schedule.diffuse(z0, noise(Purpose.KNOWN, slices, t_next), t_next)
        z = np.where(m, free, known)
    return z


def residual(reference: FloatArray, counterpart: FloatArray, mask: BoolArray) -> FloatArray:
    """|reference - counterpart| under the mask up-sampled bilinearly, (N, H, W).

    Parameters
    ----------
    reference, counterpart : (N, H, W) ndarray
    mask : (N, h, w) ndarray of bool
    """
    _, height, width = reference.shape
    return np.asarray(np.abs(reference - counterpart) * upsample(mask, (height, width)), dtype=np.float32)


def weigh(
    residual: FloatArray,
    imagined: FloatArray,
    relative_kl: FloatArray,
    foreground: BoolArray,
    contrast_floor: float,
    *,
    by_kl: bool,
) -> FloatArray:
    """What a difference is worth where it was found, (N, H, W).

    In the folds of the cortex no model knows each edge, and a difference as large as the local
    contrast says little; in even white matter it says much. And where the model was surprised
    before it imagined anything, a difference counts more.

    Parameters
    ----------
    residual, imagined : (N, H, W) ndarray
        `imagined` is the decoded counterpart, whose local standard deviation divides the residual.
    relative_kl : (N, h, w) ndarray
        KL map as a multiple of its threshold.
    foreground : (N, h, w) ndarray of bool
        Latents whose KL says something.
    contrast_floor : float
        Added to the local standard deviation; 0 leaves the residual undivided.
    by_kl : bool
        Whether the up-sampled relative KL multiplies the residual.
    """
    if contrast_floor:
        residual = residual / (contrast_floor + local_contrast(imagined))
    if by_kl:
        shape = residual.shape[1], residual.shape[2]
        weight = upsample(foreground, shape)
        known = upsample(np.where(foreground, relative_kl, np.float32(0)), shape)
        # What lies beside the head says nothing: at its edge, the foreground latents alone are averaged.
        residual = residual * np.divide(known, weight, out=np.zeros_like(known), where=weight > SMALLEST_WEIGHT)
    return residual


def local_contrast(image: FloatArray) -> FloatArray:
    """Standard deviation within the slice around each pixel, (N, H, W)."""
    window = (1, CONTRAST_WINDOW, CONTRAST_WINDOW)
    mean = ndimage.uniform_filter(image, window)
    variance = ndimage.uniform_filter(image**2, window) - mean**2
    return np.asarray(np.sqrt(np.maximum(variance, 0)), dtype=np.float32)


def median(values: FloatArray, pixels: int) -> FloatArray:
    """Median over a square of so many pixels within each slice (Behrendt et al. 2023, arXiv 2312.04215).

    What an edge leaves is a line or a speck, and falls; a lesion is a plateau, and stays.

    Parameters
    ----------
    values : (N, H, W) ndarray
    pixels : int
        Side of the square, odd; 1 leaves the values as they are.
    """
    if pixels == 1:
        return values
    result: FloatArray = ndimage.median_filter(values, size=(1, pixels, pixels))
    return result


def erode(foreground: BoolArray, pixels: int) -> BoolArray:
    """Foreground without its outermost pixels, slice by slice: there, partial volume looks like a difference."""
    if not pixels:
        return foreground
    inner: BoolArray = ndimage.binary_erosion(foreground, structure=IN_PLANE, iterations=pixels)
    return inner


def upsample(latents: npt.NDArray[np.generic], shape: tuple[int, int]) -> FloatArray:
    """Bilinear, half-pixel centres, edges held: (N, h, w) -> (N, H, W)."""
    rows, columns = (_interpolation(a, b) for a, b in zip(latents.shape[1:], shape, strict=True))
    return np.asarray(rows @ latents.astype(np.float32) @ columns.T, dtype=np.float32)


def _interpolation(few: int, many: int) -> FloatArray:
    """Matrix of linear interpolation, (many, few)."""
    at = np.clip((np.arange(many) + 0.5) * few / many - 0.5, 0, few - 1)
    return np.asarray(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(few))), dtype=np.float32)


def score(kl: FloatArray, foreground: BoolArray) -> float:
    """Image-wise score: mean KL over the foreground latents, in nats."""
    return float(kl[foreground].mean())
