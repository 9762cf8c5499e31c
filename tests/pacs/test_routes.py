"""The file of routes: targets, rules, and faults that the error names."""

from pathlib import Path

import pytest

from app.errors import InvalidSettings
from app.pacs.routes import DimseTarget, Routes, StowTarget, read_routes

FILE = """
give_up_hours = 1.5

[targets.archive]
kind = "dimse"
host = "pacs.example"
port = 104
ae_title = "ARCHIVE"

[targets.web]
kind = "stow"
url = "https://pacs.example/dicom-web"
token_file = "/run/secrets/pacs"

[[routes]]
target = "archive"
results = ["report.dcm", "segmentation.dcm"]

[[routes]]
target = "web"
results = ["report.dcm"]
models = ["t1", "flair-1.2.0"]
"""
RESULTS = ["mask.nii.gz", "segmentation.dcm", "report.dcm"]


def read(tmp_path: Path, text: str) -> Routes:
    path = tmp_path / "routes.toml"
    path.write_text(text)
    return read_routes(path)


def test_targets_and_rules_are_read(tmp_path: Path) -> None:
    routes = read(tmp_path, FILE)
    archive, web = routes.targets["archive"], routes.targets["web"]
    assert isinstance(archive, DimseTarget)
    assert isinstance(web, StowTarget)
    assert (archive.ae_title, archive.calling_ae_title, archive.tls) == ("ARCHIVE", "COUNTERPART", False)
    assert str(web.url) == "https://pacs.example/dicom-web"
    assert routes.give_up_seconds == 5400


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        ("t1-1.7.0", ["archive", "archive", "web"]),
        ("t1-9.0.0", ["archive", "archive", "web"]),
        ("flair-1.2.0", ["archive", "archive", "web"]),
        ("flair-1.3.0", ["archive", "archive"]),
        ("t1-c-1.0.0", ["archive", "archive"]),
    ],
)
def test_rules_select_results_in_their_order(tmp_path: Path, model: str, targets: list[str]) -> None:
    selected = read(tmp_path, FILE).select(model, RESULTS)
    assert [target for target, _ in selected] == targets
    assert [name for _, name in selected] == ["segmentation.dcm", "report.dcm", "report.dcm"][: len(targets)]


def test_results_that_a_job_does_not_have_are_not_selected(tmp_path: Path) -> None:
    routes = read(tmp_path, FILE)
    assert routes.select("x-1", ["mask.nii.gz", "report.dcm"]) == [("archive", "report.dcm")]
    assert routes.select("x-1", ["mask.nii.gz"]) == []


def test_nothing_is_sent_without_a_file() -> None:
    assert read_routes(None).select("t1-1.7.0", RESULTS) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('target = "web"', 'target = "wbe"', r"\[targets.wbe\]"),
        ('["report.dcm"]', '["report.json"]', "report.json is no DICOM result"),
        ('["report.dcm"]', "[]", "routes.1.results"),
        ("port = 104", 'port = "x"', "targets.archive.dimse.port"),
        ("port = 104", "port = 104\ntsl = true", "targets.archive.dimse.tsl"),
        ("port = 104", 'port = 104\nca = "ca.pem"', "need tls = true"),
        ('"ARCHIVE"', '"A TITLE THAT IS TOO LONG"', "ae_title"),
        ("https://", "file://", "targets.web.stow.url"),
        ('kind = "stow"', 'kind = "smb"', "targets.web"),
        ("[targets.web]", "[targets.WEB]", "targets.WEB"),
        ("give_up_hours = 1.5", "give_up_hours = 0", "give_up_hours"),
        ("give_up_hours = 1.5", "give_up_hours =", "TOML"),
    ],
)
def test_faults_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in FILE
    with pytest.raises(InvalidSettings, match=message):
        read(tmp_path, FILE.replace(old, new))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="No such file"):
        read_routes(tmp_path / "none.toml")
