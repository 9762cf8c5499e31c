"""Out-of-distribution check of a whole scan (docs/method.md, "Out-of-distribution check"; decision 2)."""

from dataclasses import dataclass

import numpy as np

from app.errors import OutOfDistribution
from app.manifest import Manifest, OodCheck, Range
from app.pipeline.diffusion import EncodedView, kl_map
from app.pipeline.networks import Networks
from app.volume import BoolArray, FloatArray, IntArray

# Number of slices, spread over the scan, that are decoded and whose KL is computed at every noise level of the check.
SAMPLED_SLICES = 8


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
