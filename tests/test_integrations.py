"""`counterpart detect` as mercure and MONAI Deploy call it: folders in environment variables (docs/integrations.md)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pydicom
import pytest

from app.cli import INPUT_VARIABLES, OUTPUT_VARIABLES
from app.export.outputs import DICOM_NAMES
from tests.support.dicom import write_series
from tests.support.phantom import brain, with_lesion

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "integrations.md").read_text()


def write_input(folder: Path) -> None:
    """Write a series with the file names of mercure, its task and the tags of each file."""
    for path in write_series(folder, with_lesion(brain(), (25.0, 10.0, 20.0))):
        dataset = pydicom.dcmread(path)
        name = f"{dataset.SeriesInstanceUID}#{dataset.SOPInstanceUID}"
        path.rename(folder / f"{name}.dcm")
        (folder / f"{name}.tags").write_text(json.dumps({"Modality": "MR"}))
    (folder / "task.json").write_text(json.dumps({"id": "1", "process": {"settings": {}}}))


def run(models: Path, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"COUNTERPART_MODELS": str(models)} | variables
    command = [sys.executable, "-m", "app.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("source", "target"), list(zip(INPUT_VARIABLES, OUTPUT_VARIABLES, strict=True)))
def test_folders_come_from_the_environment(tiny_models: Path, tmp_path: Path, source: str, target: str) -> None:
    write_input(tmp_path / "in")
    before = sorted(path.name for path in (tmp_path / "in").iterdir())
    (tmp_path / "out").mkdir()
    # The command of mercure is "detect": see the page.
    (command,) = set(re.findall(r'"command": "(\w+)"', PAGE))
    done = run(tiny_models, {source: str(tmp_path / "in"), target: str(tmp_path / "out")}, command)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.dcm")} == set(DICOM_NAMES)
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == before


def test_refused_scan_has_status_2_and_one_line(tiny_models: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "task.json").write_text("{}")
    variables = {"MERCURE_IN_DIR": str(tmp_path / "in"), "MERCURE_OUT_DIR": str(tmp_path / "out")}
    done = run(tiny_models, variables, "detect")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_arguments_count_more_than_the_environment(tiny_models: Path, tmp_path: Path) -> None:
    write_input(tmp_path / "in")
    variables = {"MERCURE_IN_DIR": str(tmp_path / "none"), "MERCURE_OUT_DIR": str(tmp_path / "none")}
    done = run(tiny_models, variables, "detect", str(tmp_path / "in"), "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "none").exists()


def test_page_names_every_variable() -> None:
    assert all(f"`{name}`" in PAGE for name in (*INPUT_VARIABLES, *OUTPUT_VARIABLES))
