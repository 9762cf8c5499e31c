"""Detection on one scan: steps 1 to 9 of docs/method.md.

In shapes, N counts all slices of the scan, M the analysed slices, and R the slices that are reversed. Step 10 is
`app.pipeline.findings.to_scan_result`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from app.manifest import Manifest
from app.pipeline.diffusion import (
    Diffusion,
    EncodedView,
    KeyedNoise,
    Networks,
    Schedule,
    decode_counterpart,
    encode_view,
)
from app.pipeline.preprocess import Slices, analysed_slices, to_slices
from app.pipeline.scores import (
    ScanScores,
    augment,
    average_views,
    check_in_distribution,
    compute_scan_scores,
    erode_foreground,
    latent_mask,
    masked_residual,
    postprocess_residual,
    sample_slices,
    smoothed_kl_map,
    upsample,
    weight_residual,
)
from app.volume import BoolArray, FloatArray, IntArray, Volume

ScalarT = TypeVar("ScalarT", bound=np.generic)


@dataclass(frozen=True, eq=False)
class ViewResult:
    """Result of one view.

    Attributes
    ----------
    mask : (M, h, w) ndarray of bool
        Latents that the reverse process was free to change.
    counterpart, residual : (M, H, W) ndarray
    """

    mask: BoolArray
    counterpart: FloatArray
    residual: FloatArray


@dataclass(frozen=True, eq=False)
class Detection:
    """Result of a method on the slices of the model.

    Attributes
    ----------
    slices : Slices
        Preprocessed slices and their grid.
    analysed : (N,) ndarray of bool
        Slices with enough foreground to be analysed.
    kl : (N, h, w) ndarray
        KL map of the identity view in nats. NaN outside the analysed foreground.
    latent_mask : (N, h, w) ndarray of bool
        Latents that the reverse process was free to change in the identity view.
    counterpart : (N, H, W) ndarray
        Healthy counterpart in [0, 1], mean over views. It equals x in pixels that were not changed, and is NaN in
        slices that were not analysed.
    anomaly : (N, H, W) ndarray
        Post-processed residual, mean over views. NaN in pixels that were not analysed, because 0 would mean
        healthy tissue.
    scores : ScanScores
        Scores of the whole scan.
    reversed_slices : tuple of int
        Number of slices that went through the reverse process, one number per view.
    """

    slices: Slices
    analysed: BoolArray
    kl: FloatArray
    latent_mask: BoolArray
    counterpart: FloatArray
    anomaly: FloatArray
    scores: ScanScores
    reversed_slices: tuple[int, ...]


def detect(volume: Volume, networks: Networks, manifest: Manifest, seed: int | None = None) -> Detection:
    """Compare a scan with its generated healthy counterpart.

    This is the default method, "coarse-patch-diffusion" (docs/method.md). It follows Pinaya et al. 2022
    (arXiv 2206.03461).

    Parameters
    ----------
    volume : Volume
        Scan in any orientation.
    networks : Networks
        Networks of the bundle.
    manifest : Manifest
        Settings of the bundle.
    seed : int, optional
        Seed of the keyed noise. By default that of the manifest.

    Raises
    ------
    ConstantVoxels
        Nothing in the scan is brighter than its border.
    WrongFieldOfView
        The foreground has the wrong size, or no slice has enough of it.
    OutOfDistribution
        The scan as a whole differs from the scans that the model was calibrated on.
    """
    noise = KeyedNoise(manifest.seed if seed is None else seed, manifest.latent_shape)
    diffusion = Diffusion(Schedule.from_settings(manifest.schedule), networks.denoise, noise)

    # 1. Sample axial slices from the scan ("Preprocessing").
    slices = to_slices(volume, manifest.preprocessing)
    indices = analysed_slices(slices, manifest.preprocessing)
    x, foreground = slices.x[indices], slices.foreground[indices]

    # 2. Encode the slices. The first view is the identity view ("Notation").
    identity = encode_view(x, foreground, indices, networks, diffusion)

    # 3. Compute the KL map and smooth it ("KL map").
    kl = smoothed_kl_map(identity, manifest)

    # 4. Refuse a scan that is unlike the training data ("Out-of-distribution check").
    scores = compute_scan_scores(kl, identity, networks, manifest.ood)
    check_in_distribution(scores, manifest)

    # 5 to 7. Threshold the KL map, inpaint and decode, subtract and weight.
    results = [compare_view(identity, kl, networks, manifest)]

    # 8. Repeat steps 2, 3 and 5 to 7 for each other view and average ("Test-time augmentation").
    for index, view in enumerate(manifest.views[1:], start=1):
        view_diffusion = replace(diffusion, noise=replace(noise, view=index))
        encoded = encode_view(augment(x, view), augment(foreground, view), indices, networks, view_diffusion)
        results.append(compare_view(encoded, smoothed_kl_map(encoded, manifest), networks, manifest))
    counterpart = average_views([result.counterpart for result in results], manifest.views)
    residual = average_views([result.residual for result in results], manifest.views)

    # 9. Weight, filter and smooth the mean ("Residual").
    valid_mask = erode_foreground(foreground, manifest.residual.erosion)
    residual = postprocess_residual(residual, x, valid_mask, manifest.residual, manifest.preprocessing.spacing_mm)

    count = len(slices.x)
    return Detection(
        slices=slices,
        analysed=_scatter(np.ones(len(indices), dtype=bool), indices, count, False),
        kl=_scatter(np.where(identity.foreground_latents, kl, np.nan), indices, count, np.nan),
        latent_mask=_scatter(results[0].mask, indices, count, False),
        counterpart=_scatter(np.clip(counterpart, 0, 1), indices, count, np.nan),
        anomaly=_scatter(np.where(valid_mask, residual, np.nan), indices, count, np.nan),
        scores=scores,
        reversed_slices=tuple(int(result.mask.any(axis=(1, 2)).sum()) for result in results),
    )


def compare_view(view: EncodedView, kl: FloatArray, networks: Networks, manifest: Manifest) -> ViewResult:
    """Compare the slices of one view with their healthy counterpart: steps 5 to 7 of docs/method.md.

    A slice with an empty mask has a residual
    of 0, so it is not reversed and not decoded.

    Parameters
    ----------
    view : EncodedView
    kl : (M, h, w) ndarray
        Smoothed KL map of the view in nats.
    networks : Networks
    manifest : Manifest
    """
    # 5. Threshold the KL map ("Latent mask").
    settings = manifest.kl
    mask = latent_mask(kl, view.foreground_latents, settings.threshold, settings.min_component, settings.grow)
    masked_slices = np.flatnonzero(mask.any(axis=(1, 2)))
    counterpart, residual = view.x[:, 0].copy(), np.zeros_like(view.x[:, 0])
    if masked_slices.size:
        # 6. Inpaint the masked latents and decode ("Partial reverse process").
        x = view.x[masked_slices, 0]  # (R, H, W)
        decoded = decode_counterpart(view, mask, masked_slices, networks, manifest.reverse.timesteps)
        # 7. Subtract and weight ("Residual").
        difference = masked_residual(x, decoded, mask[masked_slices])
        residual[masked_slices] = weight_residual(difference, decoded, manifest.residual.contrast_floor)
        # The up-sampled mask reaches beyond the foreground, which must not change.
        mask_weight = upsample(mask[masked_slices], view.x.shape[2:]) * view.foreground[masked_slices]
        counterpart[masked_slices] += mask_weight * (decoded - x)
    return ViewResult(mask, counterpart, residual)


def network_evaluations(manifest: Manifest, analysed: int, reversed_slices: Sequence[int]) -> int:
    """Count the evaluations of the denoiser, summed over the slices of a scan.

    Parameters
    ----------
    manifest : Manifest
    analysed : int
        Number of analysed slices.
    reversed_slices : sequence of int
        Number of slices with a latent mask that is not empty, one number per view.
    """
    ood = len(sample_slices(analysed)) * len(manifest.ood.timesteps)
    kl = len(manifest.views) * analysed * len(manifest.kl.timesteps)
    return ood + kl + sum(reversed_slices) * len(manifest.reverse.timesteps)


def _scatter(values: npt.NDArray[ScalarT], at: IntArray, count: int, fill: object) -> npt.NDArray[ScalarT]:
    """Place the values of the analysed slices among all `count` slices of the scan."""
    whole = np.full((count, *values.shape[1:]), fill, dtype=values.dtype)
    whole[at] = values
    return whole
