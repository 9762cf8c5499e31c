"""A result without a model: balls at known places, on the grid of a scan that was read."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy import ndimage

from app import __version__
from app.export.report import RESEARCH_USE_ONLY, Extent, Finding, Input, ModelUsed, Report, ScoreReport, Work
from app.manifest import Range
from app.pipeline.detect import Detection
from app.pipeline.findings import Lesion, Result
from app.volume import Scan, Volume
from tests.support.phantom import positions

Point = tuple[float, float, float]
MODEL = ModelUsed(id="tiny-0.0.1", sha256="5a" * 32, provider="cpu", seed=7, licence="Apache-2.0")


def marked(scan: Scan, balls: Sequence[tuple[Point, float]]) -> tuple[Result, Report]:
    """Mark balls (centre in RAS+ mm, radius in mm) that do not touch."""
    volume = scan.volume
    inside = [_ball(volume, centre, radius) for centre, radius in balls]
    labels = np.zeros(volume.shape, np.int32)
    anomaly = np.full(volume.shape, 0.1, np.float32)
    lesions = []
    for number, voxels in enumerate(sorted(inside, key=lambda i: -int(i.sum())), start=1):
        anomaly[voxels], labels[voxels] = 0.5 + number, number
        at = np.argwhere(voxels)
        points = affines.apply_affine(volume.affine, at)
        x, y, z = (float(v) for v in points.mean(axis=0))
        low, high = (tuple(float(v) for v in edge(axis=0)) for edge in (points.min, points.max))
        lesions.append(
            Lesion(number, float(len(at) * volume.voxel_ml), 1.5, 0.5 + number, (x, y, z), (low, high), int(at[0, 2]))  # type: ignore[arg-type]
        )
    assert ndimage.label(labels, np.ones((3, 3, 3)))[1] == len(balls), "balls that touch are one lesion"
    nothing = cast("Detection", None)  # nobody asks such a result for its counterpart
    result = Result(labels, anomaly, volume.affine, tuple(lesions), volume, nothing)
    return result, report_of(scan, result)


def _ball(volume: Volume, centre_mm: Point, radius_mm: float) -> npt.NDArray[np.bool_]:
    """`phantom.ball`, looking only at a box around it: real scans have ten million voxels."""
    at = affines.apply_affine(np.linalg.inv(volume.affine), centre_mm)
    reach = np.ceil(radius_mm / volume.spacing) + 1
    low = np.clip(np.floor(at - reach), 0, volume.shape).astype(int)
    high = np.clip(np.ceil(at + reach) + 1, 0, volume.shape).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    corner = volume.affine.copy()
    corner[:3, 3] = affines.apply_affine(volume.affine, low)
    found = np.zeros(volume.shape, dtype=bool)
    x, y, z = (int(n) for n in high - low)
    found[box] = np.linalg.norm(positions((x, y, z), corner) - np.array(centre_mm), axis=-1) <= radius_mm
    return found


def report_of(scan: Scan, result: Result) -> Report:
    """The report that belongs to a result."""
    wide = Range(low=0.0, high=1.0)
    return Report(
        code_version=__version__,
        notice=RESEARCH_USE_ONLY,
        model=MODEL,
        input=Input(
            format="dicom",
            modality=scan.source.modality,
            shape=scan.volume.shape,
            spacing_mm=(1.0, 1.0, 1.0),
            notes=("Left out: 3 localizers.",),
        ),
        analysed=Extent(volume_ml=1234.5, slices=40, slices_not_analysed=(0, 39), z_mm=(-51.5, 62.0)),
        scores=ScoreReport(
            scan=0.5, healthy_scan=wide, slices=(), healthy_slice=wide, reconstruction=0.1, fraction_out=0.0
        ),
        threshold=0.4,
        extent_threshold=0.2,
        lesion_volume_ml=round(float(result.mask.sum() * scan.volume.voxel_ml), 3),
        findings=tuple(
            Finding(
                label=lesion.label,
                volume_ml=round(lesion.volume_ml, 3),
                peak_score=round(lesion.peak, 4),
                mean_score=round(lesion.mean, 4),
                centroid_mm=lesion.centroid_mm,
                box_mm=lesion.box_mm,
                key_slice=lesion.key_slice,
            )
            for lesion in result.lesions
        ),
        work=Work(seconds={}, slices_reversed=1, network_evaluations=1),
    )


def resampled(scan: Scan, affine: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Scan:
    """A scan of the same source on another grid; what its voxels hold does not matter here."""
    return replace(scan, volume=replace(scan.volume, affine=affine))
