"""Detection on one scan, and its findings on the grid of the scan: steps 1 to 10 of docs/method.md.

In shapes, N counts all slices of the scan, M the analysed slices, and R the slices that are reversed. Step 10 is
`to_scan_result`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy import ndimage

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
from app.pipeline.findings import LabelArray, label_findings
from app.pipeline.out_of_distribution import (
    ScanScores,
    check_in_distribution,
    check_outline,
    check_white_matter,
    compute_scan_scores,
    sample_slices,
)
from app.pipeline.preprocess import Slices, analysed_slices, to_slices
from app.pipeline.scores import (
    augment,
    average_views,
    erode_foreground,
    latent_mask,
    masked_residual,
    postprocess_residual,
    smoothed_kl_map,
    upsample,
    weight_residual,
)
from app.volume import Affine, BoolArray, FloatArray, IntArray, Volume

ScalarT = TypeVar("ScalarT", bound=np.generic)

MaskArray = npt.NDArray[np.uint8]


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

    check_outline(foreground, manifest.ood)
    check_white_matter(x[:, 0], foreground, manifest.ood, manifest.preprocessing.spacing_mm)

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


# ---- findings on the grid of the scan ----------------------------------------------------------


@dataclass(frozen=True)
class Lesion:
    """Connected finding.

    Attributes
    ----------
    label : int
        Value in the label map, 1 for the largest lesion.
    volume_ml : float
    peak, mean : float
        Highest and mean value of the anomaly map in the lesion.
    difference : float
        Mean of scan minus counterpart in the lesion, in units of the scan. Above 0, the lesion is brighter.
    centroid_mm : tuple of float
        RAS+ mm.
    box_mm : tuple of tuple of float
        Smallest and largest voxel centre along each axis, RAS+ mm.
    key_slice : int
        Index along the last axis of the scan of the slice with the largest part of the lesion.
    key_z_mm : float
        Height in RAS+ mm of the axial plane with the largest part of the lesion, whatever the axes of the scan.
    """

    label: int
    volume_ml: float
    peak: float
    mean: float
    difference: float
    centroid_mm: tuple[float, float, float]
    box_mm: tuple[tuple[float, float, float], tuple[float, float, float]]
    key_slice: int
    key_z_mm: float = 0.0


@dataclass(frozen=True, eq=False)
class ScanResult:
    """Result on the grid of the scan.

    Attributes
    ----------
    labels : (X, Y, Z) ndarray of uint16
        Label of the lesion, 0 elsewhere. The type is int32 if there are more lesions than uint16 can count.
    anomaly : (X, Y, Z) ndarray of float32
        Anomaly map. The thresholds of the manifest give its scale. NaN in voxels that were not analysed.
    affine : (4, 4) ndarray
        Voxel indices of the scan to RAS+ mm.
    lesions : tuple of Lesion
        Largest first.
    volume : Volume
        Scan.
    detection : Detection
        Result on the slices of the model.
    """

    labels: LabelArray
    anomaly: FloatArray
    affine: npt.NDArray[np.float64]
    lesions: tuple[Lesion, ...]
    volume: Volume
    detection: Detection

    @cached_property
    def mask(self) -> MaskArray:
        """1 inside a lesion, 0 elsewhere, (X, Y, Z)."""
        return (self.labels > 0).astype(np.uint8)

    @property
    def counterpart(self) -> FloatArray:
        """Healthy counterpart of the scan, in its units, (X, Y, Z).

        It is computed at each access and not stored, because it is as large as the scan.
        """
        return _counterpart(self.volume, self.anomaly, self.detection)


def to_scan_result(volume: Volume, detection: Detection, manifest: Manifest) -> ScanResult:
    """Resample a detection to the grid of its scan and describe the lesions."""
    anomaly = detection.slices.grid.to_volume(detection.anomaly)
    labels, count = label_findings(anomaly, manifest.residual, volume.voxel_ml)
    boxes = ndimage.find_objects(labels)
    lesions = tuple(_describe_lesion(i + 1, labels, boxes[i], anomaly, volume, detection) for i in range(count))
    return ScanResult(labels, anomaly, volume.affine, lesions, volume, detection)


def _counterpart(volume: Volume, anomaly: FloatArray, detection: Detection) -> FloatArray:
    """Add the change of the slices to the scan. The result overwrites the resampled change to save memory."""
    grid = detection.slices.grid
    top = grid.background + grid.scale
    counterpart = grid.to_volume(detection.counterpart - detection.slices.x[:, 0])
    for change, scan, residual in zip(counterpart, volume.array, anomaly, strict=True):
        # Interpolation reaches half a pixel beyond the head. Only analysed voxels may change.
        changed = np.isfinite(residual) & (np.nan_to_num(change) != 0)
        # Slices are clipped to [0, 1], so the change is relative to the clipped value of a voxel.
        clipped = np.clip(scan[changed], grid.background, top)
        scaled = change[changed] * np.float32(grid.scale)
        change[:] = scan
        change[changed] = clipped + scaled
    return counterpart


def _describe_lesion(
    label: int,
    labels: LabelArray,
    box: tuple[slice, slice, slice],
    anomaly: FloatArray,
    volume: Volume,
    detection: Detection,
) -> Lesion:
    start = np.array([s.start for s in box])
    inside = labels[box] == label
    voxels = np.argwhere(inside) + start
    points = affines.apply_affine(volume.affine, voxels)
    values = anomaly[box][inside]
    return Lesion(
        label=label,
        volume_ml=float(inside.sum() * volume.voxel_ml),
        peak=float(values.max()),
        mean=float(values.mean(dtype=np.float64)),
        difference=_mean_difference(points, detection),
        centroid_mm=_point(points.mean(axis=0)),
        box_mm=(_point(points.min(axis=0)), _point(points.max(axis=0))),
        key_slice=int(np.bincount(voxels[:, 2]).argmax()),
        key_z_mm=_largest_plane(points[:, 2], volume.affine),
    )


def _mean_difference(points: npt.NDArray[np.float64], detection: Detection) -> float:
    """Return the mean of scan minus counterpart at RAS+ points (N, 3) in mm, in units of the scan.

    Values of the scan are cut to the intensity range of the slices, as in `_counterpart`. Only these points are
    sampled: the change of a whole scan would need as much memory as the scan.
    """
    grid = detection.slices.grid
    at = affines.apply_affine(np.linalg.inv(grid.affine), points)
    shape = np.array(detection.counterpart.shape)
    first = np.clip(np.floor(at.min(axis=0)).astype(int), 0, shape - 1)
    last = np.clip(np.ceil(at.max(axis=0)).astype(int), 0, shape - 1)
    box = tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))
    # The counterpart is NaN in slices that were not analysed.
    difference = np.nan_to_num(detection.slices.x[:, 0][box] - detection.counterpart[box])
    sampled = ndimage.map_coordinates(difference, (at - first).T, order=1, mode="nearest")
    return float(sampled.mean(dtype=np.float64) * grid.scale)


def _largest_plane(heights: npt.NDArray[np.float64], affine: Affine) -> float:
    """Return the RAS+ height of the axial plane with the most of some voxels."""
    planes, counts = np.unique(plane_numbers(heights, affine), return_counts=True)
    return plane_height(float(planes[counts.argmax()]), affine)


def plane_numbers(heights: npt.NDArray[np.float64], affine: Affine) -> npt.NDArray[np.float64]:
    """Return the numbers of the closest axial planes: the slices of an axial scan, or steps of a slice or voxel."""
    step, origin = _plane_steps(affine)
    return np.asarray(np.round((heights - origin) / step), dtype=np.float64)


def plane_height(number: float, affine: Affine) -> float:
    """Return the RAS+ height of an axial plane in mm."""
    step, origin = _plane_steps(affine)
    return number * step + origin


def _plane_steps(affine: Affine) -> tuple[float, float]:
    axis = int(np.abs(affine[2, :3]).argmax())
    return abs(float(affine[2, axis])), float(affine[2, 3])


def _point(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = (round(float(v), 2) for v in values)
    return x, y, z
