"""Augmentation of healthy slices: geometry and intensity, simulated scanners, and coarse noise.

Coarse noise is added only to the input of the denoiser. The target stays the healthy latent (decision 8). White noise
does not change anything that is larger than a latent, so a denoiser trained only with white noise reproduces lesions.
Noise with structure at several scales is better for anomaly detection (AnoDDPM, Wyatt et al. 2022), and coarse noise is
enough to train a denoising network that removes lesions (Kascenas et al. 2022). Here the noise lies in patches of
random shape.
"""

import itertools
import math

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from app.volume import FloatArray
from training.config import AugmentationConfig, CoarseNoiseConfig, ScannerConfig

# Standard deviation of the Gaussian of unsharp masking, in pixels.
UNSHARP_SD_PIXELS = 0.8
# Smallest distance between two tissue levels after their shift.
MIN_LEVEL_STEP = 0.02
# Depth in pixels to which the rim of the brain is removed.
FLUID_RIM_PIXELS = 4
# Distance between two independent displacements of the anatomy, in pixels.
WARP_SPACING_PIXELS = 16
# Independent regions of a slice in which fluid spaces are widened, in rows and columns.
FLUID_NODES = (4, 4)
# Blur before dark structures are widened, in pixels.
FLUID_BLUR_PIXELS = 1.0
# Sides of the window whose lowest value is taken, in pixels: they widen a fluid space by 2 or by 4 pixels.
FLUID_WINDOWS = (3, 5)
# A pixel of the foreground stays above 0, which is the background.
SMALLEST_TISSUE = 1e-3
# Bounds of the modulation of the coarse noise, as shares of its amplitude.
MODULATION_BOUNDS = (0.2, 1.8)


def augment(x: torch.Tensor, config: AugmentationConfig, rng: np.random.Generator) -> torch.Tensor:
    """Apply a random mirror, small affine, contrast, bias field, gain, gamma, mask and simulated scanner to each slice.

    Parameters
    ----------
    x : (B, 1, H, W) tensor in [0, 1]
    config : AugmentationConfig
    rng : Generator

    Returns
    -------
    (B, 1, H, W) tensor in [0, 1]
    """
    n, _, height, width = x.shape
    angle = np.deg2rad(rng.uniform(-1, 1, n) * config.max_rotation_degrees)
    scale = 1 + rng.uniform(-1, 1, n) * config.max_scale
    mirror = rng.choice([-1.0, 1.0], n)
    aspect = height / width
    theta = np.zeros((n, 2, 3))
    theta[:, 0, 0] = np.cos(angle) * scale * mirror
    theta[:, 0, 1] = -np.sin(angle) * scale * aspect
    theta[:, 1, 0] = np.sin(angle) * scale * mirror / aspect
    theta[:, 1, 1] = np.cos(angle) * scale
    theta[:, :, 2] = rng.uniform(-1, 1, (n, 2)) * config.max_shift_pixels * 2 / [width, height]
    grid = F.affine_grid(torch.from_numpy(theta).float(), [n, 1, height, width], align_corners=False)
    if config.warp_sd_pixels:
        grid = grid + _smooth_displacement(n, (height, width), config.warp_sd_pixels, rng)
    moved = F.grid_sample(x, grid, mode="bilinear", align_corners=False)
    if config.wide_fluid_probability:
        moved = _widen_fluid(moved, config.wide_fluid_probability, rng)
    gain = torch.from_numpy(1 + rng.uniform(-1, 1, (n, 1, 1, 1)) * config.max_gain).float()
    gamma = torch.from_numpy(np.exp(rng.uniform(-1, 1, (n, 1, 1, 1)) * config.max_log_gamma)).float()
    shifted = shift_tissues(moved.clamp(0, 1), config, rng)
    contrast = shifted * torch.from_numpy(_bias_field(n, (height, width), config, rng))[:, None]
    augmented = ((contrast / config.anchor).clamp(min=0) ** gamma * config.anchor * gain).clamp(0, 1).numpy()
    _remove_fluid_rim(augmented, config, rng)
    _erode_some(augmented, config.erosion_probability, rng)
    for i in np.flatnonzero(rng.random(n) < config.scanner.probability):
        augmented[i] = simulate_scanner(augmented[i], config.scanner, rng)
    return torch.from_numpy(augmented)


def _smooth_displacement(count: int, shape: tuple[int, int], sd: float, rng: np.random.Generator) -> torch.Tensor:
    """Draw smooth displacements for `grid_sample`, (count, H, W, 2), in its units: an image has a width of 2.

    `sd` holds at the nodes of a coarse grid, in pixels. Between them, cubic interpolation makes it a little smaller.
    """
    height, width = shape
    nodes = [max(2, round(side / WARP_SPACING_PIXELS)) + 1 for side in shape]
    coarse = torch.from_numpy(rng.normal(0, sd, (count, 2, *nodes)).astype(np.float32))
    pixels = F.interpolate(coarse, size=shape, mode="bicubic", align_corners=True)
    return pixels.permute(0, 2, 3, 1) * torch.tensor([2 / width, 2 / height])


def _widen_fluid(x: torch.Tensor, probability: float, rng: np.random.Generator) -> torch.Tensor:
    """Widen dark structures of some slices (B, 1, H, W) in places, as sulci, cisterns and ventricles widen in atrophy.

    A share of the difference between the lowest smoothed value around a pixel and its own smoothed value is added. So
    the noise of the image remains, and tissue becomes darker by about its noise. Pixels outside the foreground stay 0.
    """
    values = x.numpy().copy()
    n, _, height, width = values.shape
    coarse = torch.from_numpy(rng.normal(0, 1, (n, 1, *FLUID_NODES)).astype(np.float32))
    where = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True).numpy()[:, 0]
    shares = np.clip(0.5 + where, 0, 1) * rng.uniform(0.3, 1.0, (n, 1, 1))
    for i in np.flatnonzero(rng.random(n) < probability):
        inside = values[i] > 0
        smooth = _blur_foreground(values[i], FLUID_BLUR_PIXELS)
        # Infinity, so that the background does not count as the lowest value.
        side = int(rng.choice(FLUID_WINDOWS))
        lowest = ndimage.minimum_filter(np.where(inside, smooth, np.inf), size=(1, side, side))
        change = np.where(inside, np.minimum(lowest - smooth, 0), 0) * shares[i]
        values[i] = np.where(inside, np.clip(values[i] + change, SMALLEST_TISSUE, 1), 0)
    return torch.from_numpy(values)


def shift_tissues(x: torch.Tensor, config: AugmentationConfig, rng: np.random.Generator) -> torch.Tensor:
    """Map each slice by its own monotonic curve, which shifts the levels of the tissues.

    Scanners and sequences differ mainly in the relative intensity of the tissues (Meyer et al. 2021 remap them by a
    Gaussian mixture). This is the piecewise linear form.

    Parameters
    ----------
    x : (B, 1, H, W) tensor in [0, 1]
        0 is background and stays 0.
    config : AugmentationConfig
    rng : Generator

    Returns
    -------
    (B, 1, H, W) tensor
        The anchor value is unchanged.
    """
    if not config.tissue_shift_sd:
        return x
    knots = np.array([0.0, *config.tissue_levels, 1.0])
    is_tissue = (knots > 0) & (knots < 1)
    levels = knots + rng.normal(0, config.tissue_shift_sd, (len(x), len(knots))) * is_tissue
    levels = np.maximum.accumulate(np.clip(levels, 0, 1) + MIN_LEVEL_STEP * np.arange(len(knots)), axis=1)
    mapped = x.numpy().copy()
    for image, row in zip(mapped, levels, strict=True):
        scale = config.anchor / np.interp(config.anchor, knots, row)
        image[:] = np.where(image > 0, np.interp(image, knots, row * scale), 0)
    return torch.from_numpy(mapped)


def simulate_contrast(x: FloatArray, config: AugmentationConfig, rng: np.random.Generator) -> FloatArray:
    """Return the slices of one head with the contrast of another scanner: tissue levels, bias field and gamma.

    The ranges are those of `augment`, but one draw holds for the whole head.

    Parameters
    ----------
    x : (N, H, W) ndarray in [0, 1]
        The background is 0 and stays 0.
    config : AugmentationConfig
    rng : Generator

    Returns
    -------
    (N, H, W) ndarray, 0 or more
        Values above 1 are possible. The caller scales them as the preprocessing does.
    """
    # One row of pixels, so that a single curve maps all slices.
    row = torch.from_numpy(np.ascontiguousarray(x).reshape(1, 1, 1, -1))
    shifted = shift_tissues(row, config, rng).numpy().reshape(x.shape)
    (field,) = _bias_field(1, x.shape, config, rng)
    gamma = np.exp(rng.uniform(-1, 1) * config.max_log_gamma)
    changed = (shifted * field / config.anchor) ** gamma * config.anchor
    return np.where(x > 0, changed, 0).astype(np.float32)


def _bias_field(count: int, shape: tuple[int, ...], config: AugmentationConfig, rng: np.random.Generator) -> FloatArray:
    """Draw smooth multiplicative fields of second order, (count, *shape), for slices or for whole heads."""
    if not config.bias_field_sd:
        return np.ones((count, *(1 for _ in shape)), np.float32)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    products = [a * b for a, b in itertools.combinations(axes, 2)]
    terms = np.stack(np.broadcast_arrays(*axes, *products, *(a**2 - 1 / 3 for a in axes)))
    coefficients = rng.normal(0, config.bias_field_sd, (count, len(terms)))
    return np.exp(np.tensordot(coefficients, terms, 1)).astype(np.float32)


def _remove_fluid_rim(x: FloatArray, config: AugmentationConfig, rng: np.random.Generator) -> None:
    """Remove the dark rim of some slices in place, (B, 1, H, W), because some brain masks exclude the fluid.

    Removed are pixels below a random level that are connected to the background by such pixels.
    """
    if not config.fluid_rim_probability:
        return
    levels = rng.uniform(*config.fluid_rim_levels, len(x))
    for i in np.flatnonzero(rng.random(len(x)) < config.fluid_rim_probability):
        background, is_dark = x[i, 0] == 0, x[i, 0] < levels[i]
        x[i, 0, ndimage.binary_dilation(background, iterations=FLUID_RIM_PIXELS, mask=is_dark)] = 0


def _erode_some(x: FloatArray, probability: float, rng: np.random.Generator) -> None:
    """Remove the rim of some slices in place, (B, 1, H, W), because brain masks of other methods are tighter."""
    if not probability:
        return
    draws = rng.random(len(x))
    for i in np.flatnonzero(draws < probability):
        x[i, 0] *= ndimage.binary_erosion(x[i, 0] > 0, iterations=1 if draws[i] > probability / 3 else 2)


def simulate_scanner(x: FloatArray, config: ScannerConfig, rng: np.random.Generator) -> FloatArray:
    """Return slices of one head as another scanner might image them, with more noise, and smoother or sharper.

    A model that was trained on one scanner takes the noise of another one for an anomaly.

    Parameters
    ----------
    x : (N, H, W) ndarray in [0, 1]
        The background is 0 and stays 0.
    config : ScannerConfig
    rng : Generator

    Returns
    -------
    (N, H, W) ndarray in [0, 1]
    """
    noise = rng.uniform(0, config.max_noise_sd) * rng.standard_normal(x.shape, dtype=np.float32)
    amount = rng.uniform(-1, 1)
    # Scanners smooth and sharpen their noise together with the image.
    noisy = x + np.where(x > 0, noise.astype(np.float32), np.float32(0))
    if amount < 0:
        changed = _blur_foreground(noisy, -amount * config.max_blur_sd_pixels)
    else:
        detail = noisy - _blur_foreground(noisy, UNSHARP_SD_PIXELS)
        changed = noisy + np.float32(amount * config.max_sharpening) * detail
    return np.where(x > 0, np.clip(changed, 0, 1), np.float32(0))


def _blur_foreground(x: FloatArray, sd: float) -> FloatArray:
    """Blur each slice (N, H, W), normalised by the foreground so that the background does not darken its edge."""
    inside = (x > 0).astype(np.float32)
    weight = ndimage.gaussian_filter(inside, (0, sd, sd))
    return np.asarray(ndimage.gaussian_filter(x, (0, sd, sd)) / np.maximum(weight, np.float32(1e-6)), np.float32)


def add_coarse_noise(x: torch.Tensor, config: CoarseNoiseConfig, rng: torch.Generator) -> torch.Tensor:
    """Add patches of coarse noise to the foreground of some slices.

    Parameters
    ----------
    x : (B, 1, H, W) tensor in [0, 1]
    config : CoarseNoiseConfig
    rng : torch.Generator
        On the device of `x`.

    Returns
    -------
    (B, 1, H, W) tensor in [0, 1]
        A share of 1 - `probability` of the slices is unchanged.
    """
    head = x[:, 0] > 0
    is_changed = _uniform((0.0, 1.0), len(x), rng) < config.probability
    change = torch.where(head & is_changed, _coarse_noise(head, config, rng), 0.0)
    return (x + change[:, None]).clamp(0, 1)


def _coarse_noise(head: torch.Tensor, config: CoarseNoiseConfig, rng: torch.Generator) -> torch.Tensor:
    """Draw the change of each slice, (B, H, W): two sets of patches, each brighter or darker."""
    count = len(head)
    position = _smooth_field(head.shape, _log_uniform(config.patch_scale_pixels, count, rng), rng)
    modulation_scale = _uniform(config.modulation_scale_pixels, count, rng)
    modulation = 1 + config.modulation_sd * _smooth_field(head.shape, modulation_scale, rng)
    change = torch.zeros_like(position)
    for field in (position, -position):
        patch = field > _quantile(field, head, 1 - _uniform(config.covered_fraction, count, rng))
        # Log-uniform, because faint patches are the hard ones.
        amplitude = _log_uniform(config.amplitude, count, rng)
        sign = _uniform((-1.0, 1.0), count, rng).sign()
        change += amplitude * sign * _blur(patch.float(), _uniform(config.edge_sd_pixels, count, rng))
    return change * modulation.clamp(*MODULATION_BOUNDS)


def _uniform(span: tuple[float, float], count: int, rng: torch.Generator) -> torch.Tensor:
    """Draw one number for each slice, (B, 1, 1)."""
    low, high = span
    return low + (high - low) * torch.rand(count, 1, 1, generator=rng, device=rng.device)


def _log_uniform(span: tuple[float, float], count: int, rng: torch.Generator) -> torch.Tensor:
    return _uniform((math.log(span[0]), math.log(span[1])), count, rng).exp()


def _smooth_field(shape: torch.Size, sd: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Draw a smooth Gaussian field of unit variance for each slice, (B, H, W)."""
    field = _blur(torch.randn(shape, generator=rng, device=rng.device), sd)
    return (field - field.mean((1, 2), keepdim=True)) / field.std((1, 2), keepdim=True)


def _blur(values: torch.Tensor, sd: torch.Tensor) -> torch.Tensor:
    """Blur each slice (B, H, W) with its own Gaussian (B, 1, 1) and periodic edges, in the Fourier domain."""
    height, width = values.shape[1:]
    rows = torch.fft.fftfreq(height, device=values.device)[:, None]
    columns = torch.fft.rfftfreq(width, device=values.device)
    spectrum = torch.exp(-2 * (math.pi * sd) ** 2 * (rows**2 + columns**2))
    blurred: torch.Tensor = torch.fft.irfft2(torch.fft.rfft2(values) * spectrum, s=(height, width))
    return blurred


def _quantile(values: torch.Tensor, inside: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the quantile q (B, 1, 1) of each slice's values inside a mask; -inf if the mask is empty."""
    ordered, _ = values.masked_fill(~inside, -torch.inf).flatten(1).sort(1)
    count = inside.flatten(1).sum(1)
    rank = ordered.shape[1] - count + (q[:, 0, 0] * (count - 1).clamp(min=0)).long()
    return ordered.gather(1, rank.clamp(max=ordered.shape[1] - 1)[:, None])[..., None]
