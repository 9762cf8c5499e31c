"""The tables in section "Results" of docs/dicom.md agree with the code."""

import re
from pathlib import Path

import pydicom
import pytest

from app import errors
from app.export.dicom import identity, structured_report
from app.export.dicom.source import COPIED
from app.export.outputs import DICOM_NAMES
from tests.export.conftest import DicomResults

# Copied from the source, but not listed: parts of the references and of the grid.
NOT_LISTED = {"SeriesInstanceUID", "Modality", "SOPClassUID", "SOPInstanceUID", "Rows", "Columns"}


@pytest.fixture(scope="module")
def section() -> str:
    text = (Path(__file__).parents[2] / "docs" / "dicom.md").read_text()
    return text.split("\n## Results\n")[1].split("\n## ")[0]


def test_copied_attributes_are_listed(section: str) -> None:
    text = section.split("### Attributes copied")[1].split("###", maxsplit=1)[0]
    listed = {word for word in re.findall(r"\b[A-Z][A-Za-z]+\b", text) if pydicom.datadict.tag_for_keyword(word)}
    assert listed == set(COPIED) - NOT_LISTED


def test_private_codes_are_listed(section: str) -> None:
    values = [*vars(structured_report).values(), *vars(identity).values()]
    codes = {value.value for value in values if getattr(value, "scheme_designator", "") == "99COUNTERPART"}
    text = section.split("private scheme")[1].split("###", maxsplit=1)[0]
    assert set(re.findall(r"`([a-z-]+)`", text)) == codes


def test_reasons_for_absent_results_are_listed(section: str) -> None:
    codes = {cls.code for cls in errors.NoSuchResult.__subclasses__()}
    assert set(re.findall(r"^\| `([a-z_]+)` \|", section.split("### Where", maxsplit=1)[0], re.MULTILINE)) == codes


def test_sop_classes_and_segment_codes_are_listed(section: str, results: DicomResults) -> None:
    rows = dict(re.findall(r"^\| `([a-z]+\.dcm)` \|.*\| ([0-9.]+) \|", section, re.MULTILINE))
    made = [pydicom.dcmread(path) for path in results.paths]
    assert rows == dict(zip(DICOM_NAMES, (dataset.SOPClassUID for dataset in made), strict=True))
    segment = made[0].SegmentSequence[0]
    for sequence in ("SegmentedPropertyCategory", "SegmentedPropertyType"):
        code = segment[f"{sequence}CodeSequence"].value[0]
        assert f"SCT {code.CodeValue} {code.CodeMeaning}" in section
