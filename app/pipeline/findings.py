"""Findings on the grid of the scan: mask, maps, and a description of each lesion."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy import ndimage

from app.manifest import Manifest, Residual
from app.pipeline.detect import Detection
from app.pipeline.preprocess import bounding_box
from app.volume import Affine, BoolArray, FloatArray, Volume

MaskArray = npt.NDArray[np.uint8]
LabelArray = npt.NDArray[np.integer]


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
    lesions = tuple(_describe_lesion(i + 1, labels, boxes[i], anomaly, volume) for i in range(count))
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


def dice(found: BoolArray, truth: BoolArray) -> float:
    """Return the Dice coefficient 2 |A and B| / (|A| + |B|) of two masks. It is 1 if both are empty."""
    size = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / size if size else 1.0


def label_findings(anomaly: FloatArray, settings: Residual, voxel_ml: float) -> tuple[LabelArray, int]:
    """Label the connected findings in an anomaly map by size (docs/method.md, "Residual").

    Two thresholds are used (hysteresis, Canny 1986). A finding contains a voxel above the higher threshold, and
    extends to all connected voxels above the lower one. The higher threshold by itself would mark only the peak of a
    lesion. Voxels are 26-connected.

    Parameters
    ----------
    anomaly : (X, Y, Z) ndarray
        Anomaly map on any grid. NaN is never part of a finding.
    settings : Residual
        Thresholds and smallest volume.
    voxel_ml : float
        Volume of a voxel of that grid.

    Returns
    -------
    labels : (X, Y, Z) ndarray of uint16 or int32
        1 is the largest finding.
    count : int
    """
    with np.errstate(invalid="ignore"):
        extent = anomaly > settings.extent_threshold
        # Label the box only, because most of a scan is far from any finding.
        box = bounding_box(extent)
        inside, peaks = extent[box], anomaly[box] > settings.threshold
    labels, count = ndimage.label(inside, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    has_peak = np.bincount(labels[peaks], minlength=count + 1) > 0
    keep = has_peak & (sizes * voxel_ml >= settings.min_lesion_ml)
    keep[0] = False
    by_size = [i for i in np.argsort(-sizes, kind="stable") if keep[i]]
    fits_uint16 = len(by_size) <= np.iinfo(np.uint16).max
    dtype = np.dtype(np.uint16 if fits_uint16 else np.int32)
    rank = np.zeros(count + 1, dtype=dtype)
    rank[by_size] = np.arange(1, len(by_size) + 1)
    ranked: LabelArray = np.zeros(anomaly.shape, dtype=dtype)
    ranked[box] = rank[labels]
    return ranked, len(by_size)


def _describe_lesion(
    label: int, labels: LabelArray, box: tuple[slice, slice, slice], anomaly: FloatArray, volume: Volume
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
        centroid_mm=_point(points.mean(axis=0)),
        box_mm=(_point(points.min(axis=0)), _point(points.max(axis=0))),
        key_slice=int(np.bincount(voxels[:, 2]).argmax()),
        key_z_mm=_largest_plane(points[:, 2], volume.affine),
    )


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
