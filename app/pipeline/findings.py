"""From the slices back to the scan's own grid: mask, maps, and each lesion in numbers."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy import ndimage

from app.manifest import Manifest, Residual
from app.pipeline.detect import Detection
from app.pipeline.foreground import bounding_box
from app.volume import FloatArray, Volume

MaskArray = npt.NDArray[np.uint8]
LabelArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Lesion:
    """One connected finding. Positions are RAS+ millimetres."""

    label: int
    volume_ml: float
    peak: float
    mean: float
    centroid_mm: tuple[float, float, float]
    box_mm: tuple[tuple[float, float, float], tuple[float, float, float]]
    key_slice: int


@dataclass(frozen=True, eq=False)
class Result:
    """What differs, on the scan's own grid.

    Attributes
    ----------
    labels : (X, Y, Z) ndarray of uint16, of int32 where there are more lesions than it can count
        Label of the lesion where the scan differs from its counterpart, 0 elsewhere.
    anomaly : (X, Y, Z) ndarray of float32
        Residual, weighed as the manifest says (its threshold gives the scale); NaN where nothing was analysed.
    affine : (4, 4) ndarray
        The scan's own.
    lesions : tuple of Lesion
        Largest first.
    volume : Volume
        The scan.
    detection : Detection
        On the slices of the model.
    """

    labels: LabelArray
    anomaly: FloatArray
    affine: npt.NDArray[np.float64]
    lesions: tuple[Lesion, ...]
    volume: Volume
    detection: Detection

    @cached_property
    def mask(self) -> MaskArray:
        """1 where the scan differs from its counterpart, (X, Y, Z)."""
        return (self.labels > 0).astype(np.uint8)

    @property
    def counterpart(self) -> FloatArray:
        """The scan in its own units, with what differs replaced by what the model imagines there, (X, Y, Z).

        As large as the scan, and made whenever it is asked for: nothing keeps it.
        """
        return _counterpart(self.volume, self.anomaly, self.detection)


def to_result(volume: Volume, detection: Detection, manifest: Manifest) -> Result:
    """Bring a detection back to the grid of the scan it came from."""
    placement = detection.slices.placement
    anomaly = placement.to_volume(detection.anomaly)
    labels, count = label_findings(anomaly, manifest.residual, volume.voxel_ml)
    boxes = ndimage.find_objects(labels)
    lesions = tuple(_lesion(i + 1, labels, boxes[i], anomaly, volume) for i in range(count))
    return Result(labels, anomaly, volume.affine, lesions, volume, detection)


def _counterpart(volume: Volume, anomaly: FloatArray, detection: Detection) -> FloatArray:
    """The scan with what the model changed; slab by slab in the memory of the change."""
    placement = detection.slices.placement
    top = placement.background + placement.scale
    counterpart = placement.to_volume(detection.counterpart - detection.slices.x[:, 0])
    for change, scan, residual in zip(counterpart, volume.array, anomaly, strict=True):
        # Interpolation reaches half a pixel beyond the head: only what was analysed is changed.
        changed = np.isfinite(residual) & (np.nan_to_num(change) != 0)
        # The model saw a voxel beyond its range as the end of the range: what it changes starts there.
        seen = np.clip(scan[changed], placement.background, top)
        scaled = change[changed] * np.float32(placement.scale)
        change[:] = scan
        change[changed] = seen + scaled
    return counterpart


def dice(found: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    """Overlap of two masks, 2 |A and B| / (|A| + |B|); 1 where both are empty."""
    size = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / size if size else 1.0


def label_findings(anomaly: FloatArray, settings: Residual, voxel_ml: float) -> tuple[LabelArray, int]:
    """Connected findings, numbered by size, 1 the largest; and how many they are.

    Two thresholds (hysteresis, Canny 1986): the higher one decides whether there is a finding, the
    lower one how far it reaches, so that a threshold which healthy scans stay under does not cut a
    lesion down to its peak. Voxels join over corners.

    Parameters
    ----------
    anomaly : (X, Y, Z) ndarray
        The anomaly map on any grid; NaN is never part of a finding.
    settings : Residual
        Thresholds, and the smallest finding.
    voxel_ml : float
        Volume of a voxel of that grid.
    """
    with np.errstate(invalid="ignore"):
        whole = anomaly > settings.extent_threshold
        # Most of a scan is far from any finding.
        box = bounding_box(whole)
        inside, certain = whole[box], anomaly[box] > settings.threshold
    labels, count = ndimage.label(inside, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    found = np.bincount(labels[certain], minlength=count + 1) > 0
    keep = found & (sizes * voxel_ml >= settings.min_lesion_ml)
    keep[0] = False
    by_size = [i for i in np.argsort(-sizes, kind="stable") if keep[i]]
    few = len(by_size) <= np.iinfo(np.uint16).max
    kind = np.dtype(np.uint16 if few else np.int32)
    rank = np.zeros(count + 1, dtype=kind)
    rank[by_size] = np.arange(1, len(by_size) + 1)
    found_labels: LabelArray = np.zeros(anomaly.shape, dtype=kind)
    found_labels[box] = rank[labels]
    return found_labels, len(by_size)


def _lesion(
    label: int,
    labels: LabelArray,
    box: tuple[slice, slice, slice],
    anomaly: FloatArray,
    volume: Volume,
) -> Lesion:
    start = np.array([s.start for s in box])
    inside = labels[box] == label
    voxels = np.argwhere(inside) + start
    points = affines.apply_affine(volume.affine, voxels)
    values = anomaly[box][inside]
    # The slice along the scan's own slice axis (the last one) that shows most of the lesion.
    key_slice = int(np.bincount(voxels[:, 2]).argmax())
    return Lesion(
        label=label,
        volume_ml=float(inside.sum() * volume.voxel_ml),
        peak=float(values.max()),
        mean=float(values.mean(dtype=np.float64)),
        centroid_mm=_point(points.mean(axis=0)),
        box_mm=(_point(points.min(axis=0)), _point(points.max(axis=0))),
        key_slice=key_slice,
    )


def _point(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = (round(float(v), 2) for v in values)
    return x, y, z
