"""The whole method on one scan. It reads like METHOD's algorithm, and is nothing else."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.errors import OutOfDistribution
from app.manifest import Gate, Manifest
from app.pipeline import anomaly
from app.pipeline.models import Models
from app.pipeline.noise import KeyedNoise
from app.pipeline.prepare import BoolArray, Slices, analysed_slices, to_slices
from app.pipeline.schedule import Schedule
from app.volume import FloatArray, Volume

# The gate decodes this many slices, spread over the scan, to see whether the autoencoder knows them.
GATE_SLICES = 8

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Scores:
    """What the gate looks at, and what a report tells.

    Attributes
    ----------
    scan : float
        Mean KL over the foreground latents of the analysed slices, nats.
    slices : (K,) ndarray
        The same for each analysed slice; NaN where it has no foreground latent.
    typical : tuple of float
        Median KL of a slice at each of the gate's noise levels, least over some slices.
    reconstruction : float
        Mean |x - D(z0)| over the foreground of some slices.
    fraction_out : float
        Share of foreground latents outside the healthy range of a latent.
    """

    scan: float
    slices: FloatArray
    typical: tuple[float, ...]
    reconstruction: float
    fraction_out: float


@dataclass(frozen=True, eq=False)
class Detection:
    """What differs, on the slices of the model.

    Attributes
    ----------
    slices : Slices
        What the model saw, and the way back to the scan's grid.
    analysed : (N,) ndarray of bool
        Slices with enough foreground to be judged.
    kl : (N, h, w) ndarray
        KL map in nats; NaN where not analysed.
    latent_mask : (N, h, w) ndarray of bool
        What the reverse process was free to change.
    counterpart : (N, H, W) ndarray
        The healthy counterpart; equal to x where nothing was changed.
    anomaly : (N, H, W) ndarray
        Residual, weighed as the manifest says; NaN where nothing was analysed: a zero there would read as healthy.
    scores : Scores
        Image-wise scores.
    """

    slices: Slices
    analysed: BoolArray
    kl: FloatArray
    latent_mask: BoolArray
    counterpart: FloatArray
    anomaly: FloatArray
    scores: Scores


def detect(volume: Volume, models: Models, manifest: Manifest, seed: int | None = None) -> Detection:
    """Compare a scan with its imagined healthy counterpart.

    Parameters
    ----------
    volume : Volume
        The scan.
    models : Models
        The bundle's networks.
    manifest : Manifest
        The bundle's decisions: preparation, time steps, thresholds, gate.
    seed : int, optional
        Of the keyed noise; the manifest's by default.

    Raises
    ------
    WrongFieldOfView
        No slice holds what the model knows.
    OutOfDistribution
        The scan as a whole is not the kind of image that the model knows.
    """
    schedule = Schedule.linear(manifest.schedule.steps, manifest.schedule.beta_start, manifest.schedule.beta_end)
    noise = KeyedNoise(manifest.seed if seed is None else seed, manifest.latent_shape)
    diffusion = anomaly.Diffusion(schedule, models.denoise, noise)

    slices = to_slices(volume, manifest.preparation)
    known = analysed_slices(slices, manifest.preparation)
    x, foreground = slices.x[known], slices.foreground[known]
    latents = anomaly.latent_foreground(foreground, manifest.latent.downsampling)

    z0 = models.encode(x)
    kl = anomaly.kl_map(z0, known, diffusion, manifest.kl.timesteps, manifest.kl.mean)
    kl = anomaly.smooth_kl(kl, latents, manifest.kl_sigma)
    some = gate_slices(len(x))
    typical = typical_kl(z0[some], known[some], latents[some], diffusion, manifest.gate.timesteps)
    error = reconstruction_error(x[some, 0], foreground[some], models.decode(z0[some])[:, 0])
    scores = _scores(kl, latents, typical, error, manifest.gate)
    check_gate(scores, manifest.gate)

    mask = anomaly.latent_mask(kl, latents, manifest.kl.threshold, manifest.kl.min_component, manifest.kl.grow)
    found = np.flatnonzero(mask.any(axis=(1, 2)))  # a slice with an empty mask has residual 0: nothing to reverse
    counterpart, residual = x[:, 0].copy(), np.zeros_like(x[:, 0])
    if found.size:
        zc = anomaly.inpaint(z0[found], mask[found], known[found], diffusion, manifest.reverse.timesteps)
        imagined = models.decode(zc)[:, 0]
        reference = x[found, 0] if manifest.residual.reference == "image" else models.decode(z0[found])[:, 0]
        plain = anomaly.residual(reference, imagined, mask[found])
        surprise = kl[found] / np.float32(manifest.kl.threshold)
        weighting = manifest.residual
        residual[found] = anomaly.weigh(
            plain, imagined, surprise, latents[found], weighting.contrast_floor, by_kl=weighting.weighted_by_kl
        )
        share = anomaly.upsample(mask[found], x.shape[2:]) * foreground[found]  # nothing is painted beside the head
        counterpart[found] += share * (imagined - reference)

    judged = anomaly.erode(foreground, manifest.residual.erosion)
    residual = smooth(residual, judged, manifest.residual.smoothing_mm, manifest.preparation.spacing_mm)
    count = len(slices.x)
    return Detection(
        slices=slices,
        analysed=_spread(np.ones(len(known), dtype=bool), known, count, False),
        kl=_spread(np.where(latents, kl, np.nan), known, count, np.nan),
        latent_mask=_spread(mask, known, count, False),
        counterpart=_spread(np.clip(counterpart, 0, 1), known, count, np.nan),
        anomaly=_spread(np.where(judged, residual, np.nan), known, count, np.nan),
        scores=scores,
    )


def gate_slices(count: int) -> npt.NDArray[np.int64]:
    """Which of so many slices the gate decodes."""
    return np.unique(np.linspace(0, count - 1, GATE_SLICES).round().astype(np.int64))


def network_evaluations(manifest: Manifest, analysed: int, changed: int) -> int:
    """How often the denoiser is evaluated on a slice, over a scan.

    Parameters
    ----------
    analysed, changed : int
        Slices that are judged, and those of them with something in the latent mask.
    """
    gate = len(gate_slices(analysed)) * len(manifest.gate.timesteps)
    return gate + analysed * len(manifest.kl.timesteps) + changed * len(manifest.reverse.timesteps)


def typical_kl(
    z0: FloatArray,
    slices: npt.NDArray[np.int64],
    latents: BoolArray,
    diffusion: anomaly.Diffusion,
    timesteps: tuple[int, ...],
) -> tuple[float, ...]:
    """Median KL of a slice's foreground latents, least over the slices; one at each noise level, in nats.

    Low levels see texture, high ones anatomy and contrast: another sequence differs in one or the other,
    and in every slice. A lesion raises the median of its own slices too, since the network sees a slice
    as a whole: the least one is that of a slice without it.
    """
    seen = latents.any(axis=(1, 2))
    return tuple(_typical(anomaly.kl_map(z0, slices, diffusion, (t,))[seen], latents[seen]) for t in timesteps)


def _typical(kl: FloatArray, latents: BoolArray) -> float:
    # numpy's least, not Python's: NaN, of a model gone wrong, stays NaN.
    medians = [np.median(k[inside]) for k, inside in zip(kl, latents, strict=True)]
    return float(np.min(medians)) if medians else float("nan")


def reconstruction_error(x: FloatArray, foreground: BoolArray, reconstruction: FloatArray) -> float:
    """Mean |x - D(z0)| over the foreground, each (N, H, W)."""
    return float(np.abs(reconstruction - x)[foreground].mean())


def _scores(
    kl: FloatArray, latents: BoolArray, typical: tuple[float, ...], reconstruction: float, gate: Gate
) -> Scores:
    """Image-wise scores of the analysed slices."""
    inside = kl[latents]
    out = (inside < gate.latent.low) | (inside > gate.latent.high)
    by_slice = [anomaly.score(k, f) if f.any() else np.nan for k, f in zip(kl, latents, strict=True)]
    slices = np.array(by_slice, np.float32)
    return Scores(anomaly.score(kl, latents), slices, typical, reconstruction, float(out.mean()))


def check_gate(scores: Scores, gate: Gate) -> None:
    """Refuse a scan that the model does not know everywhere, rather than segment it.

    Raises
    ------
    OutOfDistribution
        A score is outside the healthy range, on either side.
    """
    reasons = []
    levels = zip(gate.timesteps, scores.typical, gate.typical, strict=True)
    for name, value, healthy in (
        *((f"least median KL of a slice at t = {t}", value, healthy) for t, value, healthy in levels),
        ("reconstruction error", scores.reconstruction, gate.reconstruction),
    ):
        if not healthy.holds(value):
            reasons.append(f"its {name} is {value:.3g}, healthy scans span {healthy.low:.3g} to {healthy.high:.3g}")
    if scores.fraction_out > gate.max_fraction_out:
        reasons.append(
            f"{scores.fraction_out:.0%} of its latents are outside the healthy range, at most "
            f"{gate.max_fraction_out:.0%} are accepted"
        )
    if reasons:
        raise OutOfDistribution(
            "The scan as a whole does not look like what the model was trained on: " + "; ".join(reasons) + ".",
            expected="the sequence, body part and preparation that the model's card names.",
            advice="Check that the right series was sent, prepared as the model card says, or choose another model.",
        )


def smooth(
    residual: FloatArray, foreground: BoolArray, smoothing_mm: float, spacing_mm: tuple[float, float, float]
) -> FloatArray:
    """Gaussian over the stack of what lies in the foreground, (N, H, W)."""
    if smoothing_mm == 0:
        return residual
    sigma = smoothing_mm / np.array(spacing_mm)
    result: FloatArray = ndimage.gaussian_filter(np.where(foreground, residual, np.float32(0)), sigma)
    return result


def _spread(values: npt.NDArray[T], at: npt.NDArray[np.int64], count: int, fill: object) -> npt.NDArray[T]:
    """Values of the analysed slices among all slices of the scan."""
    whole = np.full((count, *values.shape[1:]), fill, dtype=values.dtype)
    whole[at] = values
    return whole
