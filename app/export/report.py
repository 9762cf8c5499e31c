"""Report of one analysis: the document report.json. It contains no patient data."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from app import __version__
from app.manifest import FrozenModel, Manifest, Precision, Range
from app.pipeline.detect import Detection, ScanResult, network_evaluations
from app.site_profile import SiteProfile
from app.volume import Format, Scan, Scanner, Source

# A scan whose score is above the healthy range by this factor is far outside of it. Large lesions raise the score less.
FAR_OUTSIDE = 2.0
RESEARCH_USE_ONLY = "Research use only. Not a medical device. Not for diagnosis."

Point = tuple[float, float, float]


class ModelSelectionReport(FrozenModel):
    """Reason for the selection of the model (`app.runtime.selection`)."""

    by: Literal["caller", "sequence", "modality", "default"] = Field(
        description="The caller named the model (caller), the sequence or the modality of the scan matched, or no "
        "other model is installed (default)."
    )
    certain: bool = Field(description="False if the model may be unsuitable for this scan.")
    warning: str | None = Field(description="Reason why the model may be unsuitable for this scan. Null if `certain`.")


class SiteProfileReport(FrozenModel):
    """Site profile of one analysis (docs/site-calibration.md). It determined the thresholds."""

    id: str = Field(description="Date of the calibration, and the beginning of the profile's hash.")
    scans: int = Field(description="Healthy scans of the scanner that the calibration used.")
    target_ml: float = Field(description="Largest expected false-positive volume of a healthy scan of that scanner.")
    scan_score: Range = Field(description="Range of the scan score in which the profile fits.")
    other_scanner: bool = Field(description="True if the scan states another scanner than the profile, or none.")

    @classmethod
    def of(cls, profile: SiteProfile, scanner: Scanner | None) -> "SiteProfileReport":
        """Return the report of a profile that was used for a scan of a scanner."""
        return cls(
            id=profile.id,
            scans=profile.scans,
            target_ml=profile.target_ml,
            scan_score=profile.scan_score,
            other_scanner=profile.scanner != scanner,
        )


class ModelUsed(FrozenModel):
    """Model of one analysis."""

    id: str
    sha256: str = Field(description="Hash of the bundle's manifest, which contains the hashes of the bundle's files.")
    provider: str
    precision: Precision | None = Field(
        default=None, description="Number format of the denoiser's computation. Null in a report of an older version."
    )
    seed: int
    licence: str
    selection: ModelSelectionReport | None = Field(default=None, description="Null in a report of an older version.")
    site_profile: SiteProfileReport | None = Field(
        default=None, description="Null if the service has no profile for this model and scanner."
    )


class Input(FrozenModel):
    """Properties of the scan after it was read."""

    format: Format
    modality: str | None
    shape: tuple[int, int, int]
    spacing_mm: Point
    notes: tuple[str, ...] = Field(
        description="Sentences about parts of the upload that were left out, resampled or assumed."
    )


class Extent(FrozenModel):
    """Analysed part of the scan. The results are only valid there."""

    volume_ml: float = Field(description="Volume in which the anomaly map has a value.")
    slices: int = Field(description="Number of slices on the model's grid.")
    slices_not_analysed: tuple[int, ...] = Field(description="Indices of slices, counted from inferior to superior.")
    z_mm: tuple[float, float] = Field(description="Lowest and highest analysed slice, RAS+ millimetres.")


class BrainReport(FrozenModel):
    """Method and measurements of the brain extraction. The brain mask is brain.nii.gz."""

    method: str
    version: str
    sha256: str = Field(description="Hash of the extractor's manifest, which contains the hashes of its files.")
    volume_ml: float
    agreement: float = Field(description="Dice of the brain masks of the extractor's two networks, 0 to 1.")
    cut_cm2: float = Field(description="Cross-section of the brain at the border of the field of view.")
    warnings: tuple[str, ...]


class ScoreReport(FrozenModel):
    """Scores of the out-of-distribution check."""

    scan: float = Field(description="Mean KL over the foreground latents, in nats.")
    healthy_scan: Range = Field(description="Range of this score in healthy validation scans.")
    slices: tuple[float | None, ...] = Field(
        description="The same score for each slice. Null if the slice was not analysed."
    )
    healthy_slice: Range = Field(description="Range of the slice score in healthy validation scans.")
    reconstruction: float = Field(description="Mean |x - D(z0)| as a fraction of the intensity range.")
    outlier_fraction: float = Field(description="Fraction of foreground latents outside the healthy range of a latent.")


class Finding(FrozenModel):
    """One connected lesion. Positions are RAS+ millimetres. Scores are values of the anomaly map."""

    label: int
    volume_ml: float
    peak_score: float
    mean_score: float
    mean_difference: float | None = Field(
        default=None,
        description="Mean of the scan minus its counterpart, in the units of the scan (CT: HU). Above 0, the finding "
        "is brighter than the counterpart. Values outside of the intensity range of the model are cut to it first, for "
        "a CT to its window. Null in reports of earlier versions.",
    )
    centroid_mm: Point
    box_mm: tuple[Point, Point]
    key_slice: int = Field(description="Index along the scan's last axis of the slice with the largest area.")
    key_z_mm: float | None = Field(
        default=None,
        description="Height in RAS+ mm of the axial plane with the largest area.",
    )


class Cost(FrozenModel):
    """Cost of the analysis."""

    seconds: dict[str, float] = Field(description="Wall-clock seconds of each stage.")
    slices_reversed: int = Field(description="Number of slices that needed the reverse process.")
    network_evaluations: int = Field(description="Number of denoiser evaluations, summed over slices.")


class Report(FrozenModel):
    """Report of one analysis."""

    format_version: Literal[1] = 1
    notice: str = RESEARCH_USE_ONLY
    research_use_only: Literal[True] = True
    warnings: tuple[str, ...] = Field(
        default=(), description="Why the result may be wrong as a whole, the most important reason first."
    )
    code_version: str
    frame: Literal["RAS+ mm"] = "RAS+ mm"
    model: ModelUsed
    input: Input
    brain: BrainReport | None = Field(
        default=None, description="Null if no brain was extracted. `absent` contains the reason."
    )
    analysed: Extent
    scores: ScoreReport
    threshold: float = Field(description="The peak of each finding in the anomaly map is above this threshold.")
    extent_threshold: float = Field(description="Every voxel of a finding is above this threshold.")
    lesion_volume_ml: float
    findings: tuple[Finding, ...]
    absent: dict[str, dict[str, str]] = Field(
        default={}, description="Result files that this scan does not have, by name, with the reason as a problem."
    )
    work: Cost


class ReportSummary(BaseModel):
    """Part of a report that all versions since 0.1.0 can provide."""

    model: str
    code_version: str
    findings: tuple[Finding, ...]
    lesion_volume_ml: float
    selection: ModelSelectionReport | None
    seconds: dict[str, float]
    absent: dict[str, dict[str, str]]
    warnings: tuple[str, ...]


def read_report_summary(content: bytes) -> ReportSummary:
    """Read a published report.json, which an older version may have written."""
    document = json.loads(content)
    model = document["model"]
    selection = model.get("selection")
    if selection is None and (choice := model.get("choice")):  # its former name
        selection = {"by": choice["by"], "certain": choice["sure"], "warning": choice["doubt"]}
    return ReportSummary(
        model=model["id"],
        code_version=document["code_version"],
        findings=document["findings"],
        lesion_volume_ml=document["lesion_volume_ml"],
        selection=selection,
        seconds=document["work"]["seconds"],
        absent=document.get("absent", {}),
        warnings=document.get("warnings", ()),
    )


def build_report(
    scan: Scan,
    result: ScanResult,
    model: ModelUsed,
    manifest: Manifest,
    brain: BrainReport | None,
    seconds: Mapping[str, float],
) -> Report:
    """Assemble the report of one analysis.

    Parameters
    ----------
    scan : Scan
    result : ScanResult
        Findings on the scan's own grid.
    model : ModelUsed
    manifest : Manifest
        Manifest of the model.
    brain : BrainReport or None
        None if no brain was extracted.
    seconds : mapping of str to float
        Duration of each stage so far.

    Returns
    -------
    Report
        Report without the field `absent`.
    """
    detection = result.detection
    analysed = np.flatnonzero(detection.analysed)
    heights = detection.slices.grid.affine[2, 0] * analysed + detection.slices.grid.affine[2, 3]
    return Report(
        warnings=_warnings(detection, manifest, model, brain, scan.source),
        code_version=__version__,
        model=model,
        input=Input(
            format=scan.source.format,
            modality=scan.source.modality,
            shape=scan.volume.shape,
            spacing_mm=_round_point(scan.volume.spacing),
            notes=scan.source.notes,
        ),
        brain=brain,
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
        findings=build_findings(result),
        work=Cost(
            seconds={stage: round(value, 3) for stage, value in seconds.items()},
            slices_reversed=detection.reversed_slices[0],
            network_evaluations=network_evaluations(manifest, len(analysed), detection.reversed_slices),
        ),
    )


def build_findings(result: ScanResult) -> tuple[Finding, ...]:
    """Return the lesions of a result with rounded numbers."""
    return tuple(
        Finding(
            label=lesion.label,
            volume_ml=round(lesion.volume_ml, 3),
            peak_score=round(lesion.peak, 4),
            mean_score=round(lesion.mean, 4),
            mean_difference=float(f"{lesion.difference:.4g}"),
            centroid_mm=lesion.centroid_mm,
            box_mm=lesion.box_mm,
            key_slice=lesion.key_slice,
            key_z_mm=round(lesion.key_z_mm, 2),
        )
        for lesion in result.lesions
    )


def by_certainty(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings with the highest peak first: the peak decides whether a finding exists."""
    return sorted(findings, key=lambda finding: (-finding.peak_score, finding.label))


def _warnings(
    detection: Detection, manifest: Manifest, model: ModelUsed, brain: BrainReport | None, source: Source
) -> tuple[str, ...]:
    """Return why the result may be wrong as a whole."""
    warnings = []
    score, healthy, profile = detection.scores.scan, manifest.calibration.scan_score, model.site_profile
    if profile and profile.other_scanner:
        warnings.append(
            "The site profile was made for another scanner than that of the scan: its target for false findings does "
            "not hold."
        )
    if profile and score > profile.scan_score.high:
        warnings.append(
            f"The whole scan is unlike the scans of the site profile: its score is {score:.2g}, and they have at most "
            f"{profile.scan_score.high:.2g}. The target for false findings does not hold."
        )
    elif not profile and score > FAR_OUTSIDE * healthy.high:
        warnings.append(
            f"Not calibrated for this scanner: the score of the whole scan is {score:.2g}, and the healthy scans of "
            f"{manifest.id} have {healthy.low:.2g} to {healthy.high:.2g}. Expect more false findings "
            f"than the {manifest.residual.healthy_false_positive_ml:.2g} ml of a calibrated scanner."
        )
    if model.selection and model.selection.warning:
        warnings.append(f"The model may not fit the scan: {model.selection.warning}")
    warnings += filter(None, (source.position_warning, *source.warnings))
    return (*warnings, *(brain.warnings if brain else ()))


def _scores(detection: Detection, manifest: Manifest) -> ScoreReport:
    by_slice: list[float | None] = [None] * len(detection.analysed)
    for index, value in zip(np.flatnonzero(detection.analysed), detection.scores.slices, strict=True):
        by_slice[int(index)] = round(float(value), 5) if np.isfinite(value) else None
    return ScoreReport(
        scan=round(detection.scores.scan, 5),
        healthy_scan=manifest.calibration.scan_score,
        slices=tuple(by_slice),
        healthy_slice=manifest.calibration.slice_score,
        reconstruction=round(detection.scores.reconstruction, 5),
        outlier_fraction=round(detection.scores.outlier_fraction, 5),
    )


def _round_point(values: npt.NDArray[np.float64]) -> Point:
    x, y, z = (round(float(v), 4) for v in values)
    return x, y, z
