"""Reading of reports that older versions wrote."""

import json

from app.export.report import ModelSelectionReport, read_report_summary
from tests.export.conftest import DicomResults

SELECTION = ModelSelectionReport(by="modality", certain=False, warning="The sequence is unknown.")


def test_summary_contains_the_fields_of_the_report(results: DicomResults) -> None:
    report = results.report
    model = report.model.model_copy(update={"selection": SELECTION})
    changed = report.model_copy(update={"model": model, "warnings": ("Found.",)})
    summary = read_report_summary(changed.model_dump_json().encode())
    assert summary.warnings == ("Found.",)
    assert (summary.findings, summary.lesion_volume_ml) == (report.findings, report.lesion_volume_ml)
    assert (summary.selection, summary.seconds, summary.absent) == (SELECTION, report.work.seconds, report.absent)


def test_summary_of_an_older_report(results: DicomResults) -> None:
    document = json.loads(results.report.model_dump_json())
    del document["absent"], document["warnings"], document["model"]["selection"]
    assert read_report_summary(json.dumps(document).encode()).warnings == ()
    assert read_report_summary(json.dumps(document).encode()).selection is None
    document["model"]["choice"] = {"by": "modality", "sure": False, "doubt": "The sequence is unknown."}
    assert read_report_summary(json.dumps(document).encode()).selection == SELECTION
