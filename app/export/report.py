"""What a scan's analysis says, as one document. It holds no patient data."""

from typing import Literal

import numpy as np
from pydantic import Field

from app import __version__
from app.manifest import FrozenModel, Manifest, Precision, Range
from app.pipeline.detect import Detection, network_evaluations
from app.pipeline.findings import ScanResult
from app.volume import Scan

RESEARCH_USE_ONLY = "Research use only. Not a medical device. Not for diagnosis."

Point = tuple[float, float, float]


class ModelChoice(FrozenModel):
    """How the model was chosen (`app.runtime.selection`)."""

    by: Literal["caller", "sequence", "modality", "default"] = Field(
        description="The caller named it; it is for the scan's sequence; for its modality; or there is no other."
    )
    sure: bool
    doubt: str | None = Field(description="Why the scan may be none for this model.")


class ModelUsed(FrozenModel):
    id: str
    sha256: str = Field(description="Of the bundle's manifest, which holds the hashes of its files.")
    provider: str
    precision: Precision | None = Field(
        default=None, description="In which the denoiser computed. Null in a report of an older version."
    )
    seed: int
    licence: str
    choice: ModelChoice | None = Field(default=None, description="Null in a report of an older version.")


class Input(FrozenModel):
    format: Literal["nifti", "mgh", "dicom"]
    modality: str | None
    shape: tuple[int, int, int]
    spacing_mm: Point
    notes: tuple[str, ...] = Field(description="What reading decided or left out.")


class Extent(FrozenModel):
    """What was analysed, and what was not: there, nothing can be said."""

    volume_ml: float = Field(description="Volume with a value in the anomaly map.")
    slices: int = Field(description="Slices of the model.")
    slices_not_analysed: tuple[int, ...] = Field(description="Indices, inferior to superior.")
    z_mm: tuple[float, float] = Field(description="Lowest and highest analysed slice, RAS+ millimetres.")


class BrainReported(FrozenModel):
    """How the brain was taken out of its head; its mask is brain.nii.gz."""

    method: str
    version: str
    sha256: str = Field(description="Of the extractor's manifest, which holds the hashes of its files.")
    volume_ml: float
    agreement: float = Field(description="Dice of the outlines of its two networks, 0 to 1.")
    cut_cm2: float = Field(description="Cross-section of the brain at the border of the field of view.")
    warnings: tuple[str, ...]


class ScoresReported(FrozenModel):
    scan: float = Field(description="Mean KL over the foreground latents, nats.")
    healthy_scan: Range = Field(description="What healthy validation scans span.")
    slices: tuple[float | None, ...] = Field(description="The same for each slice; null where not analysed.")
    healthy_slice: Range
    reconstruction: float = Field(description="Mean |x - D(z0)|, share of the intensity range.")
    outlier_fraction: float = Field(description="Share of latents outside the healthy range of a latent.")


class Finding(FrozenModel):
    """One connected lesion. Positions are RAS+ millimetres; scores are values of the anomaly map."""

    label: int
    volume_ml: float
    peak_score: float
    mean_score: float
    centroid_mm: Point
    box_mm: tuple[Point, Point]
    key_slice: int = Field(description="Index along the scan's last axis that shows most of it.")


class Work(FrozenModel):
    """What the analysis cost."""

    seconds: dict[str, float] = Field(description="Wall-clock seconds of each stage.")
    slices_reversed: int
    network_evaluations: int = Field(description="Slices times evaluations of the denoiser.")


class Report(FrozenModel):
    """Everything that is told about one analysis."""

    format_version: Literal[1] = 1
    notice: str = RESEARCH_USE_ONLY
    research_use_only: Literal[True] = True
    code_version: str
    frame: Literal["RAS+ mm"] = "RAS+ mm"
    model: ModelUsed
    input: Input
    brain: BrainReported | None = Field(
        default=None, description="null where the scan was analysed as it came; `absent` says why."
    )
    analysed: Extent
    scores: ScoresReported
    threshold: float = Field(description="A finding rises above it somewhere in the anomaly map ...")
    extent_threshold: float = Field(description="... and reaches as far as the map stays above this.")
    lesion_volume_ml: float
    findings: tuple[Finding, ...]
    absent: dict[str, dict[str, str]] = Field(
        default={}, description="Results that this scan does not have, by file name: the problem that says why."
    )
    work: Work


def build_report(
    scan: Scan,
    detection: Detection,
    result: ScanResult,
    model: ModelUsed,
    manifest: Manifest,
    seconds: dict[str, float],
) -> Report:
    """Put the numbers of one analysis together."""
    known = np.flatnonzero(detection.analysed)
    heights = detection.slices.grid.affine[2, 0] * known + detection.slices.grid.affine[2, 3]
    return Report(
        code_version=__version__,
        model=model,
        input=Input(
            format=scan.source.format,
            modality=scan.source.modality,
            shape=scan.volume.shape,
            spacing_mm=_rounded(scan.volume.spacing),
            notes=scan.source.notes,
        ),
        analysed=Extent(
            volume_ml=round(float(np.isfinite(result.anomaly).sum()) * scan.volume.voxel_ml, 1),
            slices=len(detection.analysed),
            slices_not_analysed=tuple(int(i) for i in np.flatnonzero(~detection.analysed)),
            z_mm=(round(float(heights[0]), 1), round(float(heights[-1]), 1)),
        ),
        scores=_scores(detection, manifest),
        threshold=manifest.residual.threshold,
        extent_threshold=manifest.residual.extent_threshold,
        lesion_volume_ml=round(float(result.mask.sum()) * scan.volume.voxel_ml, 3),
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
        work=Work(
            seconds={stage: round(value, 3) for stage, value in seconds.items()},
            slices_reversed=detection.reversed[0],
            network_evaluations=network_evaluations(manifest, len(known), detection.reversed),
        ),
    )


def _scores(detection: Detection, manifest: Manifest) -> ScoresReported:
    by_slice: list[float | None] = [None] * len(detection.analysed)
    for index, value in zip(np.flatnonzero(detection.analysed), detection.scores.slices, strict=True):
        by_slice[int(index)] = round(float(value), 5) if np.isfinite(value) else None
    return ScoresReported(
        scan=round(detection.scores.scan, 5),
        healthy_scan=manifest.calibration.scan_score,
        slices=tuple(by_slice),
        healthy_slice=manifest.calibration.slice_score,
        reconstruction=round(detection.scores.reconstruction, 5),
        outlier_fraction=round(detection.scores.outlier_fraction, 5),
    )


def _rounded(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Point:
    x, y, z = (round(float(v), 4) for v in values)
    return x, y, z
