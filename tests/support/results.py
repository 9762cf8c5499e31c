"""Results for tests: analyses with the tiny bundle, and findings at known positions without a network."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel import affines
from scipy import ndimage

from app import __version__
from app.analysis import AnalysisRequest, Progress, analyse
from app.export.report import Cost, Extent, Input, ModelUsed, Report, ScoreReport, build_findings
from app.manifest import ExtractorFiles, ExtractorManifest, File, Manifest, Range
from app.pipeline.brain_extraction import ExtractionNetworks
from app.pipeline.detect import Detection, Lesion, ScanResult
from app.runtime.bundle import Bundle
from app.runtime.extractor import Extractor
from app.volume import Affine, Scan, Volume
from tests.support.heads import ORACLE
from tests.support.phantom import positions

Point = tuple[float, float, float]
Ball = tuple[Point, float]  # centre in RAS+ mm, radius in mm
MODEL = ModelUsed(id="tiny-0.0.1", sha256="5a" * 32, provider="cpu", seed=7, licence="Apache-2.0")
DEFAULTS = AnalysisRequest()


def save_nifti(path: Path, volume: Volume) -> Path:
    """Write a scan as NIfTI with whole numbers, as scanners do."""
    image = nib.Nifti1Image(np.round(volume.array).astype(np.int16), volume.affine)
    image.set_sform(volume.affine, code=1)
    image.set_qform(volume.affine, code=1)
    image.to_filename(path)
    return path


def check_progress(stage: str, fraction: float) -> None:
    """Accept the progress of an analysis."""
    assert stage in {"read", "infer", "export"}
    assert 0 <= fraction <= 1


def run_analysis(
    path: Path, out: Path, bundle: Bundle, request: AnalysisRequest = DEFAULTS, progress: Progress = check_progress
) -> Report:
    """Analyse a scan with one bundle and write its results to a folder, which is created."""

    def load(manifest: Manifest) -> Bundle:
        assert manifest == bundle.manifest
        return bundle

    out.mkdir(parents=True, exist_ok=True)
    return analyse(path, out, load, [bundle.manifest], request, progress)


def with_extractor(bundle: Bundle, networks: ExtractionNetworks = ORACLE) -> Bundle:
    """Return the bundle with a brain extractor."""
    no_file = File(name="none", sha256="0" * 64)
    files = ExtractorFiles(coarse=no_file, fine=no_file, golden=no_file)
    manifest = ExtractorManifest(
        method="oracle", version="1", licence="none", attribution="none", source_sha256="0" * 64, files=files
    )
    return replace(bundle, extractor=Extractor(manifest, "1" * 64, networks))


def make_result(scan: Scan, balls: Sequence[Ball]) -> tuple[ScanResult, Report]:
    """Return a result with one lesion per ball, and its report. The balls must not touch."""
    volume = scan.volume
    masks = sorted((_ball_mask(volume, *ball) for ball in balls), key=lambda mask: -int(mask.sum()))
    labels = np.zeros(volume.shape, np.int32)
    anomaly = np.full(volume.shape, 0.1, np.float32)
    lesions = []
    for label, mask in enumerate(masks, start=1):
        anomaly[mask], labels[mask] = 0.5 + label, label
        voxels = np.argwhere(mask)
        points = affines.apply_affine(volume.affine, voxels)
        lesions.append(
            Lesion(
                label=label,
                volume_ml=float(len(voxels) * volume.voxel_ml),
                peak=1.5,
                mean=0.5 + label,
                difference=10.0 * label,
                centroid_mm=_point(points.mean(axis=0)),
                box_mm=(_point(points.min(axis=0)), _point(points.max(axis=0))),
                key_slice=int(voxels[0, 2]),
            )
        )
    assert ndimage.label(labels, np.ones((3, 3, 3)))[1] == len(balls), "balls that touch are one lesion"
    no_detection = cast("Detection", None)  # only needed for the counterpart
    result = ScanResult(labels, anomaly, volume.affine, tuple(lesions), volume, no_detection)
    return result, _make_report(scan, result)


def on_grid(scan: Scan, affine: Affine) -> Scan:
    """Return the scan on another grid. The voxel values are not resampled."""
    return replace(scan, volume=replace(scan.volume, affine=affine))


def _ball_mask(volume: Volume, centre_mm: Point, radius_mm: float) -> npt.NDArray[np.bool_]:
    """Return the same mask as `phantom.ball`, computed in a box because real scans have ten million voxels."""
    centre = affines.apply_affine(np.linalg.inv(volume.affine), centre_mm)
    radius = np.ceil(radius_mm / volume.spacing) + 1
    low = np.clip(np.floor(centre - radius), 0, volume.shape).astype(int)
    high = np.clip(np.ceil(centre + radius) + 1, 0, volume.shape).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    affine = volume.affine.copy()
    affine[:3, 3] = affines.apply_affine(volume.affine, low)
    mask = np.zeros(volume.shape, dtype=bool)
    x, y, z = (int(n) for n in high - low)
    mask[box] = np.linalg.norm(positions((x, y, z), affine) - np.array(centre_mm), axis=-1) <= radius_mm
    return mask


def _make_report(scan: Scan, result: ScanResult) -> Report:
    wide = Range(low=0.0, high=1.0)
    return Report(
        code_version=__version__,
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
            scan=0.5, healthy_scan=wide, slices=(), healthy_slice=wide, reconstruction=0.1, outlier_fraction=0.0
        ),
        threshold=0.4,
        extent_threshold=0.2,
        lesion_volume_ml=round(float(result.mask.sum() * scan.volume.voxel_ml), 3),
        findings=build_findings(result),
        work=Cost(seconds={}, slices_reversed=1, network_evaluations=1),
    )


def _point(values: npt.NDArray[np.float64]) -> Point:
    x, y, z = (float(v) for v in values)
    return x, y, z
