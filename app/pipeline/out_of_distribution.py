"""Out-of-distribution check: scores of a whole scan, and the refusal of a scan that is unlike the training data.

In shapes, M counts the analysed slices. docs/method.md, "Out-of-distribution check", has the rules, and decision 2 the
reasons.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

from app.errors import OutOfDistribution
from app.manifest import Manifest, OodCheck, Range
from app.pipeline.diffusion import EncodedView, Networks, kl_map
from app.pipeline.preprocess import fill_holes_by_slice
from app.volume import BoolArray, FloatArray, IntArray

# Number of slices, spread over the scan, that are decoded and whose KL is computed at every noise level of the check.
SAMPLED_SLICES = 8
# Tissue of the white matter contrast: voxels at this depth in the foreground, brighter than this share of their median,
# so that fluid does not count. The smoothest share of them is white matter, the largest region without edges.
TISSUE_DEPTH_MM = 4.0
FLUID_SHARE = 0.5
SMOOTHEST_PERCENTILE = 5.0
# Standard deviation of the Gaussian before the gradient, in pixels and slices.
GRADIENT_SD = 0.7


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
