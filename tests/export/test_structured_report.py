"""DICOM Structured Report: its numbers are those of report.json."""

import json
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset

from app.export.report import RESEARCH_USE_ONLY
from tests.export.conftest import DicomResults, read_series, write_results
from tests.support.dicom import Series
from tests.support.external_tools import require_tool

DIFFERENCE = "Scan minus its healthy counterpart"
COMPREHENSIVE_SR = "1.2.840.10008.5.1.4.1.1.88.33"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> DicomResults:
    folder = tmp_path_factory.mktemp("healthy")
    return write_results(folder / "out", read_series(folder, Series(modality="CT", plane="coronal")), ())


def items(dataset: Dataset, name: str) -> list[Dataset]:
    """Return the content items of one concept at any depth."""
    return [item for item in _walk(dataset) if item.ConceptNameCodeSequence[0].CodeMeaning == name]


def _walk(dataset: Dataset) -> Iterator[Dataset]:
    for item in dataset.get("ContentSequence", ()):
        if "ConceptNameCodeSequence" in item:
            yield item
        yield from _walk(item)


def number(item: Dataset) -> tuple[float, str]:
    value = item.MeasuredValueSequence[0]
    return float(value.NumericValue), value.MeasurementUnitsCodeSequence[0].CodeValue


def coded(item: Dataset) -> tuple[str, str]:
    code = item.ConceptCodeSequence[0]
    return code.CodeValue, code.CodingSchemeDesignator


def test_report_is_a_measurement_report_of_the_study(results: DicomResults) -> None:
    made, source = pydicom.dcmread(results.structured_report), pydicom.dcmread(results.scan.source.instances[0])
    assert (made.SOPClassUID, made.Modality) == (COMPREHENSIVE_SR, "SR")
    template = made.ContentTemplateSequence[0]
    assert (template.MappingResource, template.TemplateIdentifier) == ("DCMR", "1500")
    assert made.StudyInstanceUID == source.StudyInstanceUID
    assert (made.CompletionFlag, made.VerificationFlag, made.PreliminaryFlag) == (
        "COMPLETE",
        "UNVERIFIED",
        "PRELIMINARY",
    )
    evidence = {
        reference.ReferencedSOPInstanceUID
        for study in made.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for reference in series.ReferencedSOPSequence
    }
    sources = {pydicom.dcmread(path).SOPInstanceUID for path in results.scan.source.instances}
    assert evidence == sources | {pydicom.dcmread(results.segmentation).SOPInstanceUID}


def test_each_lesion_has_its_numbers_and_refers_to_its_segment(results: DicomResults) -> None:
    made, segmentation = pydicom.dcmread(results.structured_report), pydicom.dcmread(results.segmentation)
    _, *groups = items(made, "Measurement Group")
    assert len(groups) == len(results.report.findings) == 2
    for finding, group, segment in zip(results.report.findings, groups, segmentation.SegmentSequence, strict=True):
        assert number(items(group, "Volume")[0]) == (finding.volume_ml, "mL")
        peak, mean = items(group, "Anomaly score")
        assert (number(peak), coded(peak.ContentSequence[0])) == ((finding.peak_score, "1"), ("56851009", "SCT"))
        assert (number(mean), coded(mean.ContentSequence[0])) == ((finding.mean_score, "1"), ("373098007", "SCT"))
        (difference,) = items(group, DIFFERENCE)
        assert number(difference) == (finding.mean_difference, "1"), "an MR has arbitrary units"
        assert coded(difference.ContentSequence[0]) == ("373098007", "SCT")
        assert coded(items(group, "Finding category")[0]) == ("49755003", "SCT")
        assert coded(items(group, "Finding")[0]) == ("52988006", "SCT")
        assert coded(items(group, "Finding Site")[0]) == ("12738006", "SCT")
        reference = items(group, "Referenced Segment")[0].ReferencedSOPSequence[0]
        assert reference.ReferencedSOPInstanceUID == segmentation.SOPInstanceUID
        assert reference.ReferencedSegmentNumber == finding.label == segment.SegmentNumber
        assert segment.TrackingUID == items(group, "Tracking Unique Identifier")[0].UID
        assert items(group, "Tracking Identifier")[0].TextValue == segment.TrackingID == f"Lesion {finding.label}"


@pytest.mark.parametrize("name", ["results", "healthy"])
def test_report_contains_extent_thresholds_and_algorithm(name: str, request: pytest.FixtureRequest) -> None:
    case: DicomResults = request.getfixturevalue(name)
    report, made = case.report, pydicom.dcmread(case.structured_report)
    group = items(made, "Measurement Group")[0]
    assert number(items(group, "Volume that was analysed")[0]) == (1234.5, "mL")
    assert number(items(group, "Lowest analysed position, patient z")[0]) == (-51.5, "mm")
    assert number(items(group, "Highest analysed position, patient z")[0]) == (62.0, "mm")
    assert number(items(group, "Anomaly score that a lesion rises above")[0])[0] == 0.4
    assert number(items(group, "Anomaly score that each voxel of a lesion is above")[0])[0] == 0.2
    assert number(items(group, "Number of lesions")[0])[0] == len(report.findings)
    assert number(items(group, "Volume")[0]) == (report.lesion_volume_ml, "mL")
    texts = {n: items(group, n)[0].TextValue for n in ("Algorithm Name", "Algorithm Version", "Algorithm Parameters")}
    assert texts == {
        "Algorithm Name": "Counterpart",
        "Algorithm Version": report.code_version,
        "Algorithm Parameters": f"bundle=tiny-0.0.1,bundle_sha256={'5a' * 32},seed=7,"
        "threshold=0.4,extent_threshold=0.2",
    }
    assert coded(items(group, "Algorithm Family")[0]) == ("123110", "DCM")  # Artificial Intelligence
    assert items(made, "Device Observer Serial Number")[0].TextValue == "5a" * 32
    assert [i.TextValue for i in items(made, "Comment")] == [RESEARCH_USE_ONLY, "Left out: 3 localizers."]
    assert made.ContentQualification == "RESEARCH"
    assert "research use only" in made.SeriesDescription


def test_warnings_are_comments_before_the_notes(results: DicomResults, tmp_path: Path) -> None:
    warnings = ("The whole scan is unlike the healthy scans.", "The sequence is unknown.")
    made = pydicom.dcmread(write_results(tmp_path, results.scan, warnings=warnings).structured_report)
    comments = [item.TextValue for item in items(made, "Comment")]
    assert comments == [
        RESEARCH_USE_ONLY,
        *(f"Warning: {warning}" for warning in warnings),
        "Left out: 3 localizers.",
    ]


def test_warnings_keep_the_report_valid(results: DicomResults, tmp_path: Path) -> None:
    """A warning is longer than 64 letters, the limit of a short text."""
    long = "The whole scan is unlike the healthy scans that the model knows. " * 5
    path = write_results(tmp_path, results.scan, warnings=(long.strip(), "Another.")).structured_report
    assert not [line for line in require_tool("dciodvfy")("-new", path).splitlines() if line.startswith("Error")]
    assert long.strip() in require_tool("dsrdump")("+Pl", path)


def test_difference_in_ct_is_in_hounsfield_units(tmp_path: Path) -> None:
    case = write_results(tmp_path / "out", read_series(tmp_path, Series(modality="CT")))
    found = [number(item) for item in items(pydicom.dcmread(case.structured_report), DIFFERENCE)]
    assert found == [(finding.mean_difference, "[hnsf'U]") for finding in case.report.findings]
    assert found


def test_scan_without_lesion_has_a_report_and_no_segmentation(healthy: DicomResults, results: DicomResults) -> None:
    assert not healthy.segmentation.exists()
    (reason,) = healthy.absent.values()
    assert (list(healthy.absent), reason.code) == (["segmentation.dcm"], "no_lesion")
    question = "Difference from the imagined healthy counterpart"
    answers = [coded(items(pydicom.dcmread(c.structured_report), question)[0]) for c in (healthy, results)]
    assert answers == [("272519000", "SCT"), ("52101004", "SCT")]  # Absent, Present
    made = pydicom.dcmread(healthy.structured_report)
    assert len(items(made, "Measurement Group")) == 1
    assert not items(made, "Referenced Segment")
    series = made.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert len(series) == 1
    assert len(series[0].ReferencedSOPSequence) == len(healthy.scan.source.instances)


def test_private_coding_scheme_is_declared(results: DicomResults) -> None:
    made = pydicom.dcmread(results.structured_report)
    used = {c.CodingSchemeDesignator for i in _walk(made) for c in i.ConceptNameCodeSequence}
    assert used <= {"DCM", "SCT", "UCUM", "UMLS", "99COUNTERPART"}
    (scheme,) = made.CodingSchemeIdentificationSequence
    assert (scheme.CodingSchemeDesignator, scheme.CodingSchemeResponsibleOrganization) == (
        "99COUNTERPART",
        "Counterpart",
    )


def test_dcmqi_reads_the_same_numbers(results: DicomResults, tmp_path: Path) -> None:
    """The reader of TID 1500 is based on DCMTK."""
    tid1500reader = require_tool("tid1500reader")
    tid1500reader("--inputDICOM", results.structured_report, "--outputMetadata", tmp_path / "sr.json")
    _, *groups = json.loads((tmp_path / "sr.json").read_text())["Measurements"]
    segmentation = pydicom.dcmread(results.segmentation)
    for finding, group in zip(results.report.findings, groups, strict=True):
        assert group["segmentationSOPInstanceUID"] == segmentation.SOPInstanceUID
        assert group["ReferencedSegment"] == finding.label
        read = {
            (m["quantity"]["CodeMeaning"], m.get("derivationModifier", {}).get("CodeMeaning")): float(m["value"])
            for m in group["measurementItems"]
        }
        assert read == {
            ("Volume", None): finding.volume_ml,
            ("Anomaly score", "Maximum"): finding.peak_score,
            ("Anomaly score", "Mean"): finding.mean_score,
            (DIFFERENCE, "Mean"): finding.mean_difference,
        }
