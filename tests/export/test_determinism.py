"""UIDs and bytes of the DICOM results: equal for the same analysis, different for any other."""

import datetime as dt
import shutil
from pathlib import Path

import highdicom
import pydicom
import pytest

from app.ingest.reader import read_scan
from tests.export.conftest import BALLS, OBJECTS, DicomResults, read_series, set_attributes, write_results
from tests.support.dicom import Series
from tests.support.results import MODEL

IDENTIFIERS = ("SOPInstanceUID", "SeriesInstanceUID")


class FutureClock(dt.datetime):
    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> "FutureClock":
        return cls(2066, 1, 2, 3, 4, 5, 6, tz)


def generated_uids(path: Path) -> set[str]:
    """Return the UIDs of an object, its series, its dimensions and its lesions."""
    dataset = pydicom.dcmread(path)
    uids = {str(dataset[name].value) for name in IDENTIFIERS}
    uids |= {str(item.DimensionOrganizationUID) for item in dataset.get("DimensionOrganizationSequence", ())}
    return uids | {str(segment.TrackingUID) for segment in dataset.get("SegmentSequence", ())}


def test_same_analysis_at_another_time_has_the_same_bytes(
    results: DicomResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "again").mkdir()
    for number, path in enumerate(sorted(results.scan.source.instances)):
        shutil.copy(path, tmp_path / "again" / f"{number}.dcm")
    for module in (highdicom.base, highdicom.base_content, highdicom.sr.sop):
        monkeypatch.setattr(module.datetime, "datetime", FutureClock)
    again = write_results(tmp_path / "out", read_scan(tmp_path / "again", scratch=tmp_path / "scratch"))
    for first, second in zip(results.paths, again.paths, strict=True):
        assert second.read_bytes() == first.read_bytes(), first.name


@pytest.mark.parametrize(
    "changes",
    [
        {"model": MODEL.model_copy(update={"sha256": "b" * 64})},
        {"model": MODEL.model_copy(update={"seed": 8})},
        {"model": MODEL.model_copy(update={"precision": "int8"})},
        {"code_version": "0.0.0"},
        {"threshold": 0.41},
        {"extent_threshold": 0.19},
    ],
    ids=["weights", "seed", "precision", "code", "threshold", "extent threshold"],
)
def test_another_model_or_parameter_has_other_uids(
    results: DicomResults, tmp_path: Path, changes: dict[str, object]
) -> None:
    other = write_results(tmp_path, results.scan, BALLS, "binary", **changes)
    assert generated_uids(results.structured_report).isdisjoint(generated_uids(other.structured_report))
    shared = generated_uids(results.segmentation) & generated_uids(other.segmentation)
    tracking = {str(segment.TrackingUID) for segment in pydicom.dcmread(other.segmentation).SegmentSequence}
    # A threshold that does not change the lesions does not change their tracking UIDs.
    assert shared == (tracking if {"threshold", "extent_threshold"} & changes.keys() else set())


def test_another_mask_has_other_uids(results: DicomResults, tmp_path: Path) -> None:
    (centre, radius), second = BALLS
    other = write_results(tmp_path, results.scan, ((centre, radius + 4), second))
    # The tracking UID of the second lesion, which is unchanged.
    assert len(generated_uids(results.segmentation) & generated_uids(other.segmentation)) == 1
    assert generated_uids(results.structured_report).isdisjoint(generated_uids(other.structured_report))


def test_another_patient_has_other_uids(results: DicomResults, tmp_path: Path) -> None:
    scan = read_series(tmp_path, Series(), change=set_attributes(PatientName="Somebody^Else"))
    other = write_results(tmp_path / "out", scan)
    for name in OBJECTS:
        for keyword in IDENTIFIERS:
            values = {pydicom.dcmread(getattr(case, name))[keyword].value for case in (results, other)}
            assert len(values) == 2


def test_uids_are_valid(results: DicomResults) -> None:
    for path in results.paths:
        for uid in generated_uids(path):
            assert pydicom.uid.UID(uid).is_valid
            assert uid.startswith("2.25.")
            assert int(uid.removeprefix("2.25.")) < 2**128
