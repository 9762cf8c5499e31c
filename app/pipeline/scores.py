"""Comparison of a scan with healthy ones: latent mask, out-of-distribution check, residual, test-time augmentation.

The functions take the KL map and the counterpart that `app.pipeline.diffusion` computes. In shapes, M counts the
analysed slices and N any number of slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import ConvexHull

from app.errors import OutOfDistribution
from app.manifest import Manifest, OodCheck, Range, View
from app.pipeline.diffusion import EncodedView, Networks, kl_map
from app.pipeline.preprocess import fill_holes_by_slice
from app.volume import BoolArray, FloatArray, IntArray

T = TypeVar("T", bound=np.generic)

# 8-connectivity within a slice. Components are computed in each slice separately. Only the smoothing of the KL map uses
# neighbouring slices.
IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
IN_PLANE[1] = True

# Lower bound of a sum of weights before it divides. A foreground value always has a larger weight in its own sum.
MIN_WEIGHT = 1e-6
# Number of slices, spread over the scan, that are decoded and whose KL is computed at every noise level of the check.
SAMPLED_SLICES = 8
# Tissue of the white matter contrast: voxels at this depth in the foreground, brighter than this share of their median,
# so that fluid does not count. The smoothest share of them is white matter, the largest region without edges.
TISSUE_DEPTH_MM = 4.0
FLUID_SHARE = 0.5
SMOOTHEST_PERCENTILE = 5.0
# Standard deviation of the Gaussian before the gradient, in pixels and slices.
GRADIENT_SD = 0.7
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


# ---- out-of-distribution check -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ScanScores:
    """Scores of a scan. The check compares them with healthy scans, and the report lists them.

    Attributes
    ----------
    scan : float
        Mean KL over the foreground latents of the analysed slices, in nats.
    slices : (M,) ndarray
        Mean KL of each analysed slice, in nats. NaN if the slice has no foreground latent.
    median_kl_range : tuple of (float, float)
        Smallest and largest median KL of the sampled slices, in nats, one pair for each noise level of the check.
    reconstruction : float
        Mean |x - D(z0)| over the foreground of the sampled slices.
    outlier_fraction : float
        Fraction of the foreground latents whose KL is outside the healthy range of a latent.
    """

    scan: float
    slices: FloatArray
    median_kl_range: tuple[tuple[float, float], ...]
    reconstruction: float
    outlier_fraction: float


def compute_scan_scores(kl: FloatArray, view: EncodedView, networks: Networks, settings: OodCheck) -> ScanScores:
    """Compute the scores of a scan.

    Parameters
    ----------
    kl : (M, h, w) ndarray
        Smoothed KL map of the identity view, in nats.
    view : EncodedView
        Identity view.
    networks : Networks
    settings : OodCheck
    """
    inside = kl[view.foreground_latents]
    outside = (inside < settings.latent_kl_range.low) | (inside > settings.latent_kl_range.high)
    return ScanScores(
        scan=_mean_kl(kl, view.foreground_latents),
        slices=slice_scores(kl, view.foreground_latents),
        median_kl_range=median_kl_ranges(view, settings.timesteps),
        reconstruction=reconstruction_error(view, networks),
        outlier_fraction=float(outside.mean()),
    )


def median_solidity(foreground: BoolArray) -> float:
    """Return the median over slices (M, H, W) of the area of the filled foreground, divided by that of its convex hull.

    It is 1 for a convex outline. The fingers of a hand leave deep gaps, the outline of a brain does not.
    """
    return float(np.nanmedian(solidities(foreground)))


def solidities(foreground: BoolArray) -> FloatArray:
    """Return the area of the filled foreground of each slice, divided by that of its convex hull, (M,).

    It is NaN in a slice without foreground, for example a missing one in the middle of a brain.
    """
    return np.array([_solidity(mask) if mask.any() else np.nan for mask in foreground], np.float32)


def _solidity(mask: BoolArray) -> float:
    filled = ndimage.binary_fill_holes(mask)
    corners = ndimage.binary_dilation(np.pad(filled, (0, 1)), structure=np.ones((2, 2)), origin=-1)
    # In two dimensions, `volume` is the area.
    return float(filled.sum() / ConvexHull(np.argwhere(corners)).volume)


def white_matter_contrast(x: FloatArray, foreground: BoolArray, spacing_mm: tuple[float, float, float]) -> float:
    """Return the median of the smoothest tissue, divided by the median of all tissue.

    The smoothest tissue of a brain is white matter. In T1 it is brighter than the rest, in FLAIR and CT it is not, and
    in T2 it is darker. The ratio stays above 1 at every contrast of T1.

    Parameters
    ----------
    x : (M, H, W) ndarray in [0, 1]
    foreground : (M, H, W) ndarray of bool
    spacing_mm : tuple of float
        Slice, row and column spacing.

    Returns
    -------
    float
        NaN if no tissue is deep enough.
    """
    deep = ndimage.distance_transform_edt(fill_holes_by_slice(foreground), spacing_mm) > TISSUE_DEPTH_MM
    inside = deep & foreground
    if not inside.any():
        return float("nan")
    tissue = inside & (x > FLUID_SHARE * np.median(x[inside]))
    gradient = ndimage.gaussian_gradient_magnitude(x, GRADIENT_SD)
    smooth = tissue & (gradient <= np.percentile(gradient[tissue], SMOOTHEST_PERCENTILE))
    return float(np.median(x[smooth]) / np.median(x[tissue]))


def sample_slices(count: int) -> IntArray:
    """Return the positions of `SAMPLED_SLICES` slices, spread over `count` slices."""
    return np.unique(np.linspace(0, count - 1, SAMPLED_SLICES).round().astype(np.int64))


def median_kl_ranges(view: EncodedView, timesteps: tuple[int, ...]) -> tuple[tuple[float, float], ...]:
    """Return the smallest and largest median KL of the sampled slices at each noise level, in nats.

    Low noise levels respond to texture, high ones to anatomy and contrast. Another sequence differs at one or the
    other. A lesion raises the median of the slices that contain it, because the denoiser processes a whole slice. The
    smallest median is then that of a slice without a lesion.
    """
    sampled = sample_slices(len(view.x))
    sampled = sampled[view.foreground_latents[sampled].any(axis=(1, 2))]
    foreground = view.foreground_latents[sampled]

    def medians(t: int) -> list[float]:
        kl = kl_map(view.z0[sampled], view.slice_indices[sampled], view.diffusion, (t,))
        return [float(np.median(k[inside])) for k, inside in zip(kl, foreground, strict=True)] or [float("nan")]

    # np.min and np.max return NaN if any value is NaN. Python's min and max do not.
    return tuple((float(np.min(m)), float(np.max(m))) for m in map(medians, timesteps))


def reconstruction_error(view: EncodedView, networks: Networks) -> float:
    """Return the mean |x - D(z0)| over the foreground of the sampled slices."""
    sampled = sample_slices(len(view.x))
    error = np.abs(networks.decode(view.z0[sampled]) - view.x[sampled])[:, 0]
    return float(error[view.foreground[sampled]].mean())


def slice_scores(kl: FloatArray, foreground: BoolArray) -> FloatArray:
    """Return the mean KL over the foreground latents of each slice, (M,), in nats. NaN if there is none."""
    scores = [_mean_kl(k, f) if f.any() else np.nan for k, f in zip(kl, foreground, strict=True)]
    return np.array(scores, np.float32)


def outlier_slice_fraction(slices: FloatArray, healthy: Range) -> float:
    """Return the fraction of slice scores (M,) outside the healthy range. A NaN counts as outside."""
    return float(1 - ((slices >= healthy.low) & (slices <= healthy.high)).mean())


def check_in_distribution(scores: ScanScores, manifest: Manifest) -> None:
    """Raise an error if the scan as a whole differs from the scans that the model was calibrated on.

    See docs/method.md, "Out-of-distribution check", and decision 2.

    Raises
    ------
    OutOfDistribution
        The range of the median KL of the slices does not overlap the healthy range, too many slices have a mean KL
        outside the healthy range, the reconstruction error is outside the healthy range, or too many latents are
        outliers.
    """
    settings, few = manifest.ood, len(scores.slices) < SAMPLED_SLICES
    # The extremes over a few slices differ from those over a whole stack. If slices are checked one by one, that check
    # is enough for a scan of few slices.
    reasons = [] if few and settings.max_outlier_slice_fraction is not None else _median_kl_reasons(scores, settings)
    if settings.max_outlier_slice_fraction is not None:
        healthy = manifest.calibration.slice_score
        fraction = outlier_slice_fraction(scores.slices, healthy)
        if fraction > settings.max_outlier_slice_fraction:
            reasons.append(
                f"{fraction:.0%} of its slices have a mean KL outside {healthy.low:.3g} to {healthy.high:.3g}, "
                f"at most {settings.max_outlier_slice_fraction:.0%} are accepted"
            )
    if not settings.reconstruction_range.contains(scores.reconstruction):
        reasons.append(
            f"its reconstruction error is {scores.reconstruction:.3g}, "
            f"healthy scans have {settings.reconstruction_range.low:.3g} to {settings.reconstruction_range.high:.3g}"
        )
    if scores.outlier_fraction > settings.max_outlier_fraction:
        reasons.append(
            f"{scores.outlier_fraction:.0%} of its latents are outside the healthy range, at most "
            f"{settings.max_outlier_fraction:.0%} are accepted"
        )
    if reasons:
        raise OutOfDistribution(
            "The scan as a whole differs from the scans that the model was calibrated on: " + "; ".join(reasons) + ".",
            expected="the sequence, body part and preparation that the model card names.",
            advice=("Send the whole series: a few slices are not enough for this check. " if few else "")
            + "Check that the right series was sent and prepared as the model card describes, or choose another model.",
        )


def check_outline(foreground: BoolArray, settings: OodCheck) -> None:
    """Raise an error if the outline of the foreground (M, H, W) has deeper gaps than that of a brain.

    Raises
    ------
    OutOfDistribution
        The median solidity is below the smallest accepted one.
    """
    if settings.min_solidity is None:
        return
    solidity = median_solidity(foreground)
    if solidity < settings.min_solidity:
        raise OutOfDistribution(
            f"The outline has deep gaps. The foreground fills {solidity:.0%} of its convex hull, "
            f"at least {settings.min_solidity:.0%} are accepted.",
            expected="the body part that the model card names.",
            advice="Send the whole series of the body part that the model card names.",
        )


def check_white_matter(
    x: FloatArray, foreground: BoolArray, settings: OodCheck, spacing_mm: tuple[float, float, float]
) -> None:
    """Raise an error if white matter is not brighter than the other tissue, as it is in T1.

    A scan without tissue that is deep enough is not checked. See `white_matter_contrast` for the parameters.

    Raises
    ------
    OutOfDistribution
        The contrast is below the smallest accepted one.
    """
    if settings.min_white_matter_contrast is None:
        return
    contrast = white_matter_contrast(x, foreground, spacing_mm)
    if contrast < settings.min_white_matter_contrast:
        raise OutOfDistribution(
            f"The contrast of the tissues is not that of a T1-weighted scan. White matter has {contrast:.2f} times the "
            f"intensity of all tissue, at least {settings.min_white_matter_contrast:.2f} times are accepted.",
            expected="a T1-weighted scan: white matter is brighter than grey matter.",
            advice="Send the T1-weighted series, or choose a model for the sequence of this scan.",
        )


def _median_kl_reasons(scores: ScanScores, settings: OodCheck) -> list[str]:
    """Describe each noise level at which no slice has a median KL like that of healthy slices."""
    return [
        f"the median KL of its slices at t = {t} is {low:.3g} to {high:.3g}, "
        f"healthy scans have slices between {healthy.low:.3g} and {healthy.high:.3g}"
        for t, (low, high), healthy in zip(
            settings.timesteps, scores.median_kl_range, settings.median_kl_range, strict=True
        )
        if not (low <= healthy.high and high >= healthy.low)
    ]


def _mean_kl(kl: FloatArray, foreground: BoolArray) -> float:
    return float(kl[foreground].mean())


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
