"""docs/dicom.md, "Results": tables that keep up with the code."""

import re
from pathlib import Path

import pydicom
import pytest

from app import errors
from app.export.outputs import DICOM_NAMES
from app.export.dicom import structured_report
from app.export.dicom.source import COPIED, INSTANCE, LOSSY, PATIENT, SERIES, STUDY
from tests.export.conftest import Written

# Of the source, but not of the patient: what a reference consists of, and the grid.
NOT_LISTED = {"SeriesInstanceUID", "Modality", "SOPClassUID", "SOPInstanceUID", "Rows", "Columns"}


@pytest.fixture(scope="module")
def results() -> str:
    text = (Path(__file__).parents[2] / "docs" / "dicom.md").read_text()
    return text.split("\n## Results\n")[1].split("\n## ")[0]


def test_copied_attributes(results: str) -> None:
    section = results.split("### What is copied")[1].split("###", maxsplit=1)[0]
    listed = {word for word in re.findall(r"\b[A-Z][A-Za-z]+\b", section) if pydicom.datadict.tag_for_keyword(word)}
    assert listed == {*PATIENT, *STUDY, *SERIES, *INSTANCE, *LOSSY} - NOT_LISTED == set(COPIED) - NOT_LISTED


def test_private_codes(results: str) -> None:
    codes = {
        v.value for v in vars(structured_report).values() if getattr(v, "scheme_designator", "") == "99COUNTERPART"
    }
    section = results.split("private scheme")[1].split("###", maxsplit=1)[0]
    assert set(re.findall(r"`([a-z-]+)`", section)) == codes


def test_reasons_for_an_absent_result(results: str) -> None:
    leaves = {cls.code for cls in errors.NoSuchResult.__subclasses__()}
    assert set(re.findall(r"^\| `([a-z_]+)` \|", results.split("### Where", maxsplit=1)[0], re.MULTILINE)) == leaves


def test_sop_classes_and_codes(results: str, written: Written) -> None:
    rows = dict(re.findall(r"^\| `([a-z]+\.dcm)` \|.*\| ([0-9.]+) \|", results, re.MULTILINE))
    made = [pydicom.dcmread(path) for path in (written.segmentation, written.structured_report)]
    assert rows == dict(zip(DICOM_NAMES, (dataset.SOPClassUID for dataset in made), strict=True))
    segment = made[0].SegmentSequence[0]
    for sequence in ("SegmentedPropertyCategory", "SegmentedPropertyType"):
        code = segment[f"{sequence}CodeSequence"].value[0]
        assert f"SCT {code.CodeValue} {code.CodeMeaning}" in results
