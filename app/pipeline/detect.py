"""The whole method on one scan. It reads like METHOD's algorithm, and is nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.manifest import Manifest, View
from app.pipeline import anomaly
from app.pipeline.gate import Scores, check_gate, gate_slices, image_scores
from app.pipeline.models import Models
from app.pipeline.noise import KeyedNoise
from app.pipeline.prepare import BoolArray, Slices, analysed_slices, to_slices
from app.pipeline.schedule import Schedule
from app.pipeline.seen import Seen, see, surprise
from app.pipeline.views import turn, turn_back
from app.volume import FloatArray, Volume

T = TypeVar("T", bound=np.generic)


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
    scores = image_scores(kl, plain, models, manifest.gate)
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
