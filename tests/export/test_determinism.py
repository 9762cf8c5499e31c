"""The same input, model and parameters: the same bytes. Anything else: other UIDs."""

import datetime as dt
import shutil
from pathlib import Path

import highdicom
import pydicom
import pytest
from pydicom.dataset import FileDataset

from app.ingest.reader import read_scan
from tests.export.conftest import BALLS, Written, scan_of, write
from tests.support.dicom import Series
from tests.support.results import MODEL

IDENTIFIERS = ("SOPInstanceUID", "SeriesInstanceUID")


class LaterClock(dt.datetime):
    """Forty years on."""

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> "LaterClock":
        return cls(2066, 1, 2, 3, 4, 5, 6, tz)


def uids(path: Path) -> set[str]:
    """Every UID that an object makes up: its own, its series', its dimensions', its lesions'."""
    dataset = pydicom.dcmread(path)
    found = {str(dataset[name].value) for name in IDENTIFIERS}
    found |= {str(i.DimensionOrganizationUID) for i in dataset.get("DimensionOrganizationSequence", ())}
    return found | {str(s.TrackingUID) for s in dataset.get("SegmentSequence", ())}


def test_the_same_bytes_whenever_and_wherever(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "again").mkdir()
    for number, path in enumerate(sorted(written.scan.source.instances)):
        shutil.copy(path, tmp_path / "again" / f"{number}.dcm")
    for module in (highdicom.base, highdicom.base_content, highdicom.sr.sop):
        monkeypatch.setattr(module.datetime, "datetime", LaterClock)
    again = write(tmp_path / "out", read_scan(tmp_path / "again", scratch=tmp_path / "scratch"))
    assert again.segmentation.read_bytes() == written.segmentation.read_bytes()
    assert again.structured_report.read_bytes() == written.structured_report.read_bytes()


def other_patient(slices: list[FileDataset]) -> None:
    for dataset in slices:
        dataset.PatientName = "Somebody^Else"


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
    ids=lambda c: next(iter(c)),
)
def test_another_model_or_parameter_has_other_uids(
    written: Written, tmp_path: Path, changes: dict[str, object]
) -> None:
    other = write(tmp_path, written.scan, BALLS, **changes)
    assert uids(written.structured_report).isdisjoint(uids(other.structured_report))
    own = uids(written.segmentation) & uids(other.segmentation)
    tracked = {str(s.TrackingUID) for s in pydicom.dcmread(other.segmentation).SegmentSequence}
    # A threshold by itself moves nothing that it has not moved: the lesions are those there were.
    assert own == (tracked if {"threshold", "extent_threshold"} & changes.keys() else set())


def test_another_mask_has_other_uids(written: Written, tmp_path: Path) -> None:
    (centre, radius), second = BALLS
    other = write(tmp_path, written.scan, ((centre, radius + 4), second))
    shared = uids(written.segmentation) & uids(other.segmentation)
    # The second lesion is the same one, in the same analysis otherwise.
    assert len(shared) == 1
    assert uids(written.structured_report).isdisjoint(uids(other.structured_report))


def test_another_patient_has_other_uids(written: Written, tmp_path: Path) -> None:
    other = write(tmp_path / "out", scan_of(tmp_path, Series(), change=other_patient))
    for name in IDENTIFIERS:
        for path, theirs in (
            (written.segmentation, other.segmentation),
            (written.structured_report, other.structured_report),
        ):
            assert pydicom.dcmread(path)[name].value != pydicom.dcmread(theirs)[name].value


def test_uids_are_uids(written: Written) -> None:
    for path in (written.segmentation, written.structured_report):
        for uid in uids(path):
            assert pydicom.uid.UID(uid).is_valid
            assert uid.startswith("2.25.")
            assert int(uid.removeprefix("2.25.")) < 2**128
