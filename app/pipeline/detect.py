"""The whole method on one scan. It reads like METHOD's algorithm, and is nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.errors import OutOfDistribution
from app.manifest import Gate, Manifest, Range, View
from app.pipeline import anomaly
from app.pipeline.models import Models
from app.pipeline.noise import KeyedNoise
from app.pipeline.prepare import BoolArray, Slices, analysed_slices, to_slices
from app.pipeline.schedule import Schedule
from app.pipeline.views import turn, turn_back
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
    typical : tuple of (float, float)
        Median KL of a slice at each of the gate's noise levels, least and greatest over some slices.
    reconstruction : float
        Mean |x - D(z0)| over the foreground of some slices.
    fraction_out : float
        Share of foreground latents outside the healthy range of a latent.
    """

    scan: float
    slices: FloatArray
    typical: tuple[tuple[float, float], ...]
    reconstruction: float
    fraction_out: float


@dataclass(frozen=True, eq=False)
class Seen:
    """Slices as one view shows them, and what they are to the networks.

    Attributes
    ----------
    x : (K, 1, H, W) ndarray
    foreground : (K, H, W) ndarray of bool
    known : (K,) ndarray of int
        Indices of the slices in the scan's stack: keys of the noise.
    z0 : (K, C, h, w) ndarray
    latents : (K, h, w) ndarray of bool
        Foreground latents.
    diffusion : Diffusion
        With the noise of this view.
    """

    x: FloatArray
    foreground: BoolArray
    known: npt.NDArray[np.int64]
    z0: FloatArray
    latents: BoolArray
    diffusion: anomaly.Diffusion


@dataclass(frozen=True, eq=False)
class Compared:
    """What differs in one view.

    Attributes
    ----------
    mask : (K, h, w) ndarray of bool
        What the reverse process was free to change.
    counterpart, residual : (K, H, W) ndarray
    """

    mask: BoolArray
    counterpart: FloatArray
    residual: FloatArray


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
        KL map of the plain view in nats; NaN where not analysed.
    latent_mask : (N, h, w) ndarray of bool
        What the reverse process was free to change in the plain view.
    counterpart : (N, H, W) ndarray
        The healthy counterpart, mean over views; equal to x where nothing was changed.
    anomaly : (N, H, W) ndarray
        Residual, weighed as the manifest says, mean over views; NaN where nothing was analysed: a zero there would
        read as healthy.
    scores : Scores
        Image-wise scores.
    reversed : tuple of int
        Slices that went through the reverse process, in each view.
    """

    slices: Slices
    analysed: BoolArray
    kl: FloatArray
    latent_mask: BoolArray
    counterpart: FloatArray
    anomaly: FloatArray
    scores: Scores
    reversed: tuple[int, ...]


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

    plain = see(x, foreground, known, models, diffusion)
    kl = surprise(plain, manifest)
    scores = _scores(kl, plain, models, manifest.gate)
    check_gate(scores, manifest)

    compared = [compare(plain, kl, models, manifest)]
    for index, view in enumerate(manifest.views[1:], start=1):
        own = replace(diffusion, noise=replace(noise, view=index))
        seen = see(turn(x, view), turn(foreground, view), known, models, own)
        compared.append(compare(seen, surprise(seen, manifest), models, manifest))
    counterpart = mean_view([c.counterpart for c in compared], manifest.views)
    residual = mean_view([c.residual for c in compared], manifest.views)

    judged = anomaly.erode(foreground, manifest.residual.erosion)
    residual = settle(residual, x, judged, manifest.residual, manifest.preparation.spacing_mm)
    count = len(slices.x)
    return Detection(
        slices=slices,
        analysed=_spread(np.ones(len(known), dtype=bool), known, count, False),
        kl=_spread(np.where(plain.latents, kl, np.nan), known, count, np.nan),
        latent_mask=_spread(compared[0].mask, known, count, False),
        counterpart=_spread(np.clip(counterpart, 0, 1), known, count, np.nan),
        anomaly=_spread(np.where(judged, residual, np.nan), known, count, np.nan),
        scores=scores,
        reversed=tuple(int(c.mask.any(axis=(1, 2)).sum()) for c in compared),
    )


def see(
    x: FloatArray, foreground: BoolArray, known: npt.NDArray[np.int64], models: Models, diffusion: anomaly.Diffusion
) -> Seen:
    """Encode the slices of one view."""
    z0 = models.encode(x)
    latents = anomaly.latent_foreground(foreground, x.shape[-1] // z0.shape[-1])
    return Seen(x, foreground, known, z0, latents, diffusion)


def surprise(seen: Seen, manifest: Manifest) -> FloatArray:
    """KL map of one view, smoothed as the manifest says, (K, h, w)."""
    kl = anomaly.kl_map(seen.z0, seen.known, seen.diffusion, manifest.kl.timesteps, manifest.kl.mean)
    return anomaly.smooth_kl(kl, seen.latents, manifest.kl_sigma)


def compare(seen: Seen, kl: FloatArray, models: Models, manifest: Manifest) -> Compared:
    """Imagine the healthy counterpart where the KL is high, and see what differs there.

    A slice with an empty mask has residual 0, and nothing to reverse.
    """
    settings = manifest.residual
    mask = anomaly.latent_mask(kl, seen.latents, manifest.kl.threshold, manifest.kl.min_component, manifest.kl.grow)
    found = np.flatnonzero(mask.any(axis=(1, 2)))
    counterpart, residual = seen.x[:, 0].copy(), np.zeros_like(seen.x[:, 0])
    if found.size:
        imagined = imagine(seen, mask, found, models, manifest.reverse.timesteps)
        reference = seen.x[found, 0] if settings.reference == "image" else models.decode(seen.z0[found])[:, 0]
        relative_kl = kl[found] / np.float32(manifest.kl.threshold)
        residual[found] = anomaly.weigh(
            anomaly.residual(reference, imagined, mask[found]),
            imagined,
            relative_kl,
            seen.latents[found],
            settings.contrast_floor,
            by_kl=settings.weighted_by_kl,
        )
        # Nothing is painted beside the head.
        share = anomaly.upsample(mask[found], seen.x.shape[2:]) * seen.foreground[found]
        counterpart[found] += share * (imagined - reference)
    return Compared(mask, counterpart, residual)


def imagine(
    seen: Seen, mask: BoolArray, found: npt.NDArray[np.int64], models: Models, timesteps: tuple[int, ...]
) -> FloatArray:
    """The decoded counterpart of the slices found, (F, H, W)."""
    zc = anomaly.inpaint(seen.z0[found], mask[found], seen.known[found], seen.diffusion, timesteps)
    return models.decode(zc)[:, 0]


def mean_view(stacks: Sequence[FloatArray], views: Sequence[View]) -> FloatArray:
    """Mean of what each view shows, brought back to the plain one, (K, H, W)."""
    back = [turn_back(stack, view) for stack, view in zip(stacks, views, strict=True)]
    return np.asarray(np.mean(back, axis=0), dtype=np.float32)


class Settling(Protocol):
    """What a manifest, or a configuration, decides of a finished residual."""

    @property
    def weighted_by_intensity(self) -> bool: ...
    @property
    def median_pixels(self) -> int: ...
    @property
    def smoothing_mm(self) -> float: ...


def settle(
    residual: FloatArray,
    x: FloatArray,
    judged: BoolArray,
    settings: Settling,
    spacing_mm: tuple[float, float, float],
) -> FloatArray:
    """The residual weighed by intensity, without specks, and smoothed over what is judged, as the settings say.

    Parameters
    ----------
    residual : (K, H, W) ndarray
    x : (K, 1, H, W) ndarray
        The slices.
    judged : (K, H, W) ndarray of bool

    Returns
    -------
    (K, H, W) ndarray
    """
    if settings.weighted_by_intensity:
        residual = residual * x[:, 0]
    residual = anomaly.median(residual, settings.median_pixels)
    return smooth(residual, judged, settings.smoothing_mm, spacing_mm)


def gate_slices(count: int) -> npt.NDArray[np.int64]:
    """Which of so many slices the gate decodes."""
    return np.unique(np.linspace(0, count - 1, GATE_SLICES).round().astype(np.int64))


def network_evaluations(manifest: Manifest, analysed: int, reversed_slices: Sequence[int]) -> int:
    """How often the denoiser is evaluated on a slice, over a scan.

    Parameters
    ----------
    analysed : int
        Slices that are judged.
    reversed_slices : sequence of int
        Those of them with something in the latent mask, in each view.
    """
    gate = len(gate_slices(analysed)) * len(manifest.gate.timesteps)
    kl = len(manifest.views) * analysed * len(manifest.kl.timesteps)
    return gate + kl + sum(reversed_slices) * len(manifest.reverse.timesteps)


def typical_kl(seen: Seen, timesteps: tuple[int, ...]) -> tuple[tuple[float, float], ...]:
    """Median KL of a slice's foreground latents, least and greatest over the slices of the gate, in nats.

    One pair at each noise level: low levels see texture, high ones anatomy and contrast, and another
    sequence differs in one or the other. A lesion raises the median of its own slices too, since the
    network sees a slice as a whole: the least one is that of a slice without it.
    """
    some = gate_slices(len(seen.x))
    some = some[seen.latents[some].any(axis=(1, 2))]

    def medians(t: int) -> list[float]:
        kl = anomaly.kl_map(seen.z0[some], seen.known[some], seen.diffusion, (t,))
        return [float(np.median(k[inside])) for k, inside in zip(kl, seen.latents[some], strict=True)] or [float("nan")]

    # numpy's least and greatest, not Python's: NaN, of a model gone wrong, stays NaN.
    return tuple((float(np.min(m)), float(np.max(m))) for m in map(medians, timesteps))


def reconstruction_error(seen: Seen, models: Models) -> float:
    """Mean |x - D(z0)| over the foreground of the gate's slices."""
    some = gate_slices(len(seen.x))
    return float(np.abs(models.decode(seen.z0[some]) - seen.x[some])[:, 0][seen.foreground[some]].mean())


def _scores(kl: FloatArray, seen: Seen, models: Models, gate: Gate) -> Scores:
    """Image-wise scores of the analysed slices."""
    inside = kl[seen.latents]
    out = (inside < gate.latent.low) | (inside > gate.latent.high)
    by_slice = [anomaly.score(k, f) if f.any() else np.nan for k, f in zip(kl, seen.latents, strict=True)]
    return Scores(
        scan=anomaly.score(kl, seen.latents),
        slices=np.array(by_slice, np.float32),
        typical=typical_kl(seen, gate.timesteps),
        reconstruction=reconstruction_error(seen, models),
        fraction_out=float(out.mean()),
    )


def check_gate(scores: Scores, manifest: Manifest) -> None:
    """Refuse a scan that the model does not know everywhere, rather than segment it.

    Raises
    ------
    OutOfDistribution
        A score is outside the healthy range, on either side; the typical KL, in every slice; the mean KL of a slice, in
        more slices than the manifest accepts.
    """
    gate, few = manifest.gate, len(scores.slices) < GATE_SLICES
    # Extremes over a few slices are not those of a stack: where the gate asks each slice, that says enough.
    reasons = [] if few and gate.max_slices_out is not None else _untypical(scores, gate)
    if gate.max_slices_out is not None:
        healthy = manifest.calibration.slice_score
        out = slices_out(scores.slices, healthy)
        if out > gate.max_slices_out:
            reasons.append(
                f"{out:.0%} of its slices have a mean KL outside {healthy.low:.3g} to {healthy.high:.3g}, "
                f"at most {gate.max_slices_out:.0%} are accepted"
            )
    if not gate.reconstruction.holds(scores.reconstruction):
        reasons.append(
            f"its reconstruction error is {scores.reconstruction:.3g}, "
            f"healthy scans span {gate.reconstruction.low:.3g} to {gate.reconstruction.high:.3g}"
        )
    if scores.fraction_out > gate.max_fraction_out:
        reasons.append(
            f"{scores.fraction_out:.0%} of its latents are outside the healthy range, at most "
            f"{gate.max_fraction_out:.0%} are accepted"
        )
    if reasons:
        raise OutOfDistribution(
            "The scan as a whole does not look like what the model was trained on: " + "; ".join(reasons) + ".",
            expected="the sequence, body part and preparation that the model's card names.",
            advice=("Send the whole series: one slice, or a few, say little. " if few else "")
            + "Check that the right series was sent, prepared as the model card says, or choose another model.",
        )


def _untypical(scores: Scores, gate: Gate) -> list[str]:
    """Noise levels at which no slice is as surprising as slices of healthy scans are."""
    return [
        f"the median KL of its slices at t = {t} spans {least:.3g} to {greatest:.3g}, "
        f"healthy scans have slices between {healthy.low:.3g} and {healthy.high:.3g}"
        for t, (least, greatest), healthy in zip(gate.timesteps, scores.typical, gate.typical, strict=True)
        if not (least <= healthy.high and greatest >= healthy.low)
    ]


def slices_out(slices: FloatArray, healthy: Range) -> float:
    """Share of slices whose score, (K,), is none of a healthy slice; one without a score is none either."""
    return float(1 - ((slices >= healthy.low) & (slices <= healthy.high)).mean())


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
