"""Comparison of a scan with its counterpart: latent mask, residual, test-time augmentation.

The functions take the KL map and the counterpart that `app.pipeline.diffusion` computes. In shapes, M counts the
analysed slices and N any number of slices.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.manifest import Manifest, View
from app.pipeline.diffusion import EncodedView, kl_map
from app.volume import BoolArray, FloatArray

T = TypeVar("T", bound=np.generic)

# 8-connectivity within a slice. Components are computed in each slice separately. Only the smoothing of the KL map uses
# neighbouring slices.
IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
IN_PLANE[1] = True

# Lower bound of a sum of weights before it divides. A foreground value always has a larger weight in its own sum.
MIN_WEIGHT = 1e-6
# Side of the window of the local contrast, in pixels: an edge and both of its sides.
CONTRAST_WINDOW = 5


# ---- KL map and latent mask --------------------------------------------------------------------


def smooth_kl(kl: FloatArray, foreground: BoolArray, sigma: tuple[float, float, float]) -> FloatArray:
    """Smooth a KL map with a Gaussian over the foreground latents of the stack, (N, h, w).

    The noise of neighbouring slices is independent, and a lesion spans several slices. Smoothing therefore raises the
    contrast of a lesion.

    Parameters
    ----------
    kl : (N, h, w) ndarray
    foreground : (N, h, w) ndarray of bool
    sigma : tuple of float
        Standard deviation in slices, rows and columns of latents.
    """
    if not any(sigma):
        return kl
    inside = foreground.astype(np.float32)
    weight = ndimage.gaussian_filter(inside, sigma)
    total = ndimage.gaussian_filter(kl * inside, sigma)
    return np.asarray(np.where(foreground, total / np.maximum(weight, MIN_WEIGHT), kl), dtype=np.float32)


def smoothed_kl_map(view: EncodedView, manifest: Manifest) -> FloatArray:
    """Compute the KL map of one view and smooth it with the settings of the manifest, (M, h, w), in nats."""
    kl = kl_map(view.z0, view.slice_indices, view.diffusion, manifest.kl.timesteps, manifest.kl.mean)
    return smooth_kl(kl, view.foreground_latents, manifest.kl_sigma)


def latent_mask(kl: FloatArray, foreground: BoolArray, threshold: float, min_component: int, grow: int) -> BoolArray:
    """Mark the latents that the reverse process may change (docs/method.md, "Latent mask").

    Pinaya et al. 2022, section 2. The mask contains the foreground latents above the threshold. Small connected
    components are removed, then the rest is dilated inside the foreground.

    Parameters
    ----------
    kl : (N, h, w) ndarray
        KL map in nats.
    foreground : (N, h, w) ndarray of bool
    threshold : float
        Nats.
    min_component : int
        Smallest connected component that is kept, in latents.
    grow : int
        Number of dilations.

    Returns
    -------
    (N, h, w) ndarray of bool
    """
    mask = (kl > threshold) & foreground
    if min_component > 1:
        labels, count = ndimage.label(mask, structure=IN_PLANE)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        sizes[0] = 0
        mask = sizes[labels] >= min_component
    if grow:
        mask = ndimage.binary_dilation(mask, structure=IN_PLANE, iterations=grow, mask=foreground)
    return mask


# ---- residual of one view ----------------------------------------------------------------------


def masked_residual(x: FloatArray, counterpart: FloatArray, mask: BoolArray) -> FloatArray:
    """Compute |x - counterpart| times the up-sampled latent mask (docs/method.md, "Residual").

    Pinaya et al. 2022, section 2.

    Parameters
    ----------
    x, counterpart : (N, H, W) ndarray
    mask : (N, h, w) ndarray of bool

    Returns
    -------
    (N, H, W) ndarray
    """
    _, height, width = x.shape
    return np.asarray(np.abs(x - counterpart) * upsample(mask, (height, width)), dtype=np.float32)


def weight_residual(residual: FloatArray, counterpart: FloatArray, contrast_floor: float) -> FloatArray:
    """Divide a residual by the local contrast of the counterpart (docs/method.md, "Residual").

    No model predicts each edge in the folds of the cortex, so a difference as large as the local contrast is expected
    there. In even white matter the same difference is a finding.

    Parameters
    ----------
    residual : (N, H, W) ndarray
    counterpart : (N, H, W) ndarray
        Decoded counterpart.
    contrast_floor : float
        Value that is added to the local contrast. If it is 0, the residual is not changed.
    """
    if not contrast_floor:
        return residual
    return residual / (contrast_floor + local_contrast(counterpart))


def local_contrast(image: FloatArray) -> FloatArray:
    """Compute the standard deviation around each pixel, within its slice, (N, H, W)."""
    window = (1, CONTRAST_WINDOW, CONTRAST_WINDOW)
    mean = ndimage.uniform_filter(image, window)
    variance = ndimage.uniform_filter(image**2, window) - mean**2
    return np.asarray(np.sqrt(np.maximum(variance, 0)), dtype=np.float32)


def upsample(latents: npt.NDArray[np.generic], shape: tuple[int, int]) -> FloatArray:
    """Up-sample bilinearly with half-pixel centres and edge values held, (N, h, w) -> (N, H, W)."""
    rows, columns = (_interpolation_matrix(a, b) for a, b in zip(latents.shape[1:], shape, strict=True))
    return np.asarray(rows @ latents.astype(np.float32) @ columns.T, dtype=np.float32)


def _interpolation_matrix(size: int, target: int) -> FloatArray:
    """Return the matrix of linear interpolation from `size` to `target` samples, (target, size)."""
    at = np.clip((np.arange(target) + 0.5) * size / target - 0.5, 0, size - 1)
    return np.asarray(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size))), dtype=np.float32)


# ---- post-processing ---------------------------------------------------------------------------


class ResidualSettings(Protocol):
    """Post-processing settings, from a manifest or from a training configuration."""

    @property
    def weighted_by_intensity(self) -> bool: ...
    @property
    def median_pixels(self) -> int: ...
    @property
    def smoothing_mm(self) -> float: ...


def postprocess_residual(
    residual: FloatArray,
    x: FloatArray,
    valid_mask: BoolArray,
    settings: ResidualSettings,
    spacing_mm: tuple[float, float, float],
) -> FloatArray:
    """Weight a residual by intensity, filter it with a median, and smooth it (docs/method.md, "Residual").

    Parameters
    ----------
    residual : (M, H, W) ndarray
    x : (M, 1, H, W) ndarray
        Slices in [0, 1].
    valid_mask : (M, H, W) ndarray of bool
        Pixels that have a value in the result.
    settings : ResidualSettings
    spacing_mm : tuple of float
        Slice, row and column spacing.

    Returns
    -------
    (M, H, W) ndarray
    """
    if settings.weighted_by_intensity:
        residual = residual * x[:, 0]
    residual = median_filter(residual, settings.median_pixels)
    return smooth_residual(residual, valid_mask, settings.smoothing_mm, spacing_mm)


def median_filter(values: FloatArray, pixels: int) -> FloatArray:
    """Filter with a median over a square within each slice (Behrendt et al. 2023, arXiv 2312.04215).

    The filter removes the lines and specks that edges leave, and keeps the plateau of a lesion.

    Parameters
    ----------
    values : (N, H, W) ndarray
    pixels : int
        Side of the square, odd. If it is 1, the values are returned as they are.
    """
    if pixels == 1:
        return values
    result: FloatArray = ndimage.median_filter(values, size=(1, pixels, pixels))
    return result


def smooth_residual(
    residual: FloatArray, valid_mask: BoolArray, smoothing_mm: float, spacing_mm: tuple[float, float, float]
) -> FloatArray:
    """Smooth the valid part of a residual with a Gaussian over the stack, (N, H, W).

    Parameters
    ----------
    residual : (N, H, W) ndarray
    valid_mask : (N, H, W) ndarray of bool
    smoothing_mm : float
        Standard deviation. If it is 0, the residual is not changed.
    spacing_mm : tuple of float
        Slice, row and column spacing.
    """
    if smoothing_mm == 0:
        return residual
    sigma = smoothing_mm / np.array(spacing_mm)
    result: FloatArray = ndimage.gaussian_filter(np.where(valid_mask, residual, np.float32(0)), sigma)
    return result


def erode_foreground(foreground: BoolArray, pixels: int) -> BoolArray:
    """Remove the outermost pixels of the foreground, slice by slice.

    At the edge of the head, partial volume looks like a difference.
    """
    if not pixels:
        return foreground
    inner: BoolArray = ndimage.binary_erosion(foreground, structure=IN_PLANE, iterations=pixels)
    return inner


# ---- test-time augmentation --------------------------------------------------------------------


def augment(stack: npt.NDArray[T], view: View) -> npt.NDArray[T]:
    """Mirror and shift slices, (..., H, W) (docs/method.md, "Test-time augmentation").

    Errors of the networks, and the position of a lesion on the grid of latents, depend on how a slice is presented. The
    mean over views reduces both. A shift is cyclic.
    """
    mirrored = stack[..., ::-1] if view.mirrored else stack
    return np.ascontiguousarray(np.roll(mirrored, view.shift, axis=(-2, -1)))


def invert_augmentation(stack: npt.NDArray[T], view: View) -> npt.NDArray[T]:
    """Undo `augment`, (..., H, W)."""
    rows, columns = view.shift
    moved = np.roll(stack, (-rows, -columns), axis=(-2, -1))
    return np.ascontiguousarray(moved[..., ::-1] if view.mirrored else moved)


def average_views(stacks: Sequence[FloatArray], views: Sequence[View]) -> FloatArray:
    """Return the mean of one stack of each view, mapped back to the identity view, (M, H, W)."""
    restored = [invert_augmentation(stack, view) for stack, view in zip(stacks, views, strict=True)]
    return np.asarray(np.mean(restored, axis=0), dtype=np.float32)
