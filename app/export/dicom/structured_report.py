"""DICOM Structured Report with the findings: TID 1500, Measurement Report (PS3.16)."""

from collections.abc import Iterator
from typing import Any

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr import (
    AlgorithmIdentification,
    CodeContentItem,
    CodedConcept,
    ComprehensiveSR,
    ContainerContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    ReferencedSegment,
    RelationshipTypeValues,
    SourceSeriesForSegmentation,
    TextContentItem,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from app.export.dicom.identity import (
    ANOMALY_SCORE,
    CATEGORY,
    CODING_SCHEME,
    CODING_SCHEME_NAME,
    MANUFACTURER,
    SITE,
    TYPE,
    algorithm_parameters,
    analysis_key,
    derived_uid,
    device_uid,
    private_code,
    shared_arguments,
    tracking_identifiers,
)
from app.export.dicom.source import SourceSeries
from app.export.report import Finding, Report

SERIES_NUMBER = 9002
SERIES_DESCRIPTION = "Counterpart: report (research use only)"

MILLILITRE = CodedConcept("mL", "UCUM", "milliliter")
MILLIMETRE = CodedConcept.from_code(codes.UCUM.Millimeter)
ONE = CodedConcept.from_code(codes.UCUM.NoUnits)
HOUNSFIELD_UNIT = CodedConcept.from_code(codes.UCUM.HounsfieldUnit)

# PS3.16 TID 1500, row 12.
QUALITATIVE_EVALUATIONS = CodedConcept("C0034375", "UMLS", "Qualitative Evaluations")

ANOMALY_THRESHOLD = private_code("anomaly-threshold", "Anomaly score that a lesion rises above")
EXTENT_THRESHOLD = private_code("anomaly-extent-threshold", "Anomaly score that each voxel of a lesion is above")
ANALYSED_VOLUME = private_code("analysed-volume", "Volume that was analysed")
LOWEST_ANALYSED = private_code("analysed-lowest", "Lowest analysed position, patient z")
HIGHEST_ANALYSED = private_code("analysed-highest", "Highest analysed position, patient z")
LESION_COUNT = private_code("lesion-count", "Number of lesions")
SCAN_MINUS_COUNTERPART = private_code("scan-minus-counterpart", "Scan minus its healthy counterpart")
DIFFERENCE = private_code("difference", "Difference from the imagined healthy counterpart")


def build_structured_report(source: SourceSeries, segmentation: Dataset | None, report: Report) -> ComprehensiveSR:
    """Build the report with placeholder UIDs.

    Parameters
    ----------
    source : SourceSeries
        Listed as evidence.
    segmentation : Dataset or None
        Complete segmentation with its UIDs. Its segment numbers are the labels of the findings. None if there is no
        finding, or if the source has no frame of reference. Then the measurements of a lesion refer to no segment.
    report : Report
        Contains the numbers.
    """
    lesions = [_lesion_group(source, segmentation, report, finding) for finding in report.findings]
    content = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=_observer(report)),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=[_analysis_group(source, report), *lesions],
        title=codes.DCM.ImagingMeasurementReport,
    )
    content[0].ContentSequence.append(_qualitative_evaluations(report))
    return ComprehensiveSR(
        evidence=[*source.evidence, *([] if segmentation is None else [segmentation])],
        content=content[0],
        series_number=SERIES_NUMBER,
        is_complete=True,
        series_description=SERIES_DESCRIPTION,
        coding_schemes=[
            CodingSchemeIdentificationItem(
                CODING_SCHEME, name=CODING_SCHEME_NAME, responsible_organization=MANUFACTURER
            )
        ],
        **shared_arguments(source, report),
    )


def _observer(report: Report) -> ObserverContext:
    """Return this software as the device that made the observations."""
    return ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
            uid=device_uid(report),
            name=MANUFACTURER,
            manufacturer_name=MANUFACTURER,
            model_name=report.model.id,
            serial_number=report.model.sha256,
        ),
    )


def _algorithm(report: Report) -> AlgorithmIdentification:
    """Return the Algorithm Identification (TID 4019)."""
    # highdicom joins the parameters of a segmentation in the same way.
    parameters = ",".join(f"{name}={value}" for name, value in algorithm_parameters(report).items())
    return AlgorithmIdentification(
        name=MANUFACTURER,
        version=report.code_version,
        parameters=[parameters],
        family=codes.DCM.ArtificialIntelligence,
        manufacturer=MANUFACTURER,
    )


def _analysis_group(source: SourceSeries, report: Report) -> MeasurementsAndQualitativeEvaluations:
    """Return the measurements of the whole scan (TID 1501)."""
    low, high = report.analysed.z_mm
    uid = derived_uid("analysis", source.uid, *analysis_key(report))
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid=uid, identifier="Analysis"),
        finding_sites=[FindingSite(SITE)],
        algorithm_id=_algorithm(report),
        measurements=[
            Measurement(ANALYSED_VOLUME, report.analysed.volume_ml, MILLILITRE),
            Measurement(LOWEST_ANALYSED, low, MILLIMETRE),
            Measurement(HIGHEST_ANALYSED, high, MILLIMETRE),
            Measurement(ANOMALY_THRESHOLD, round(report.threshold, 6), ONE),
            Measurement(EXTENT_THRESHOLD, round(report.extent_threshold, 6), ONE),
            Measurement(LESION_COUNT, len(report.findings), ONE),
            Measurement(codes.SCT.Volume, report.lesion_volume_ml, MILLILITRE, derivation=codes.SCT.Total),
        ],
    )


def _lesion_group(
    source: SourceSeries, segmentation: Dataset | None, report: Report, finding: Finding
) -> MeasurementsAndQualitativeEvaluations | VolumetricROIMeasurementsAndQualitativeEvaluations:
    """Return the measurements of one lesion, which refer to its segment (TID 1411), or to none (TID 1501)."""
    name, uid = tracking_identifiers(report, source.uid, finding.label)
    shared: dict[str, Any] = {
        "tracking_identifier": TrackingIdentifier(uid=uid, identifier=name),
        "finding_category": CATEGORY,
        "finding_type": TYPE,
        "finding_sites": [FindingSite(SITE)],
        "algorithm_id": _algorithm(report),
        "measurements": [
            Measurement(codes.SCT.Volume, finding.volume_ml, MILLILITRE),
            Measurement(ANOMALY_SCORE, finding.peak_score, ONE, derivation=codes.SCT.Maximum),
            Measurement(ANOMALY_SCORE, finding.mean_score, ONE, derivation=codes.SCT.Mean),
            *_mean_difference(report, finding),
        ],
    }
    if segmentation is None:
        return MeasurementsAndQualitativeEvaluations(**shared)
    # `ReferencedSegment.from_segmentation` fails for a single segment (highdicom 0.28.2).
    segment = ReferencedSegment(
        segmentation.SOPClassUID,
        segmentation.SOPInstanceUID,
        finding.label,
        source_series=SourceSeriesForSegmentation(source.uid),
    )
    return VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=segment, **shared)


def _mean_difference(report: Report, finding: Finding) -> Iterator[Measurement]:
    """Yield the mean difference of a lesion, in HU or in the arbitrary units of an MR. Earlier reports have none."""
    if finding.mean_difference is not None:
        unit = HOUNSFIELD_UNIT if report.input.modality == "CT" else ONE
        yield Measurement(SCAN_MINUS_COUNTERPART, finding.mean_difference, unit, derivation=codes.SCT.Mean)


def _qualitative_evaluations(report: Report) -> ContainerContentItem:
    """Return the result as Present or Absent, followed by comments (TID 1500, rows 12 to 14)."""
    container = ContainerContentItem(QUALITATIVE_EVALUATIONS, relationship_type=RelationshipTypeValues.CONTAINS)
    answer = codes.SCT.Present if report.findings else codes.SCT.Absent
    container.ContentSequence = ContentSequence(
        [CodeContentItem(DIFFERENCE, answer, RelationshipTypeValues.CONTAINS), *_comments(report)]
    )
    return container


def _comments(report: Report) -> Iterator[TextContentItem]:
    """Yield the notice, the warnings about the whole result and the notes of the reader."""
    warnings = (f"Warning: {warning}" for warning in report.warnings)
    for text in (report.notice, *warnings, *report.input.notes):
        yield TextContentItem(codes.DCM.Comment, text, RelationshipTypeValues.CONTAINS)
