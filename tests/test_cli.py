"""The command line: exit statuses, output streams, results, messages without file names, imports."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from app import __version__
from app.cli import app
from app.export.outputs import DICOM_NAMES, REQUIRED_NAMES, write_nifti
from app.pipeline.findings import dice
from tests.support.dicom import SECRET, Series, write_series
from tests.support.phantom import ball, brain, grid, with_lesion

Run = Callable[..., Result]

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "cli.md").read_text()
LESION_MM = (28.0, -12.0, 8.0)
RADIUS_MM = 15.0
# For `counterpart --help` on an idle machine.
HELP_SECONDS = 0.5
BUSY_FACTOR = 4
HEAVY_MODULES = (
    *("numpy", "scipy", "nibabel", "pydantic", "pydicom", "highdicom", "fastapi", "dbos", "onnxruntime", "torch"),
)


@pytest.fixture
def run(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COUNTERPART_MODELS", str(tiny_models))
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A phantom with a lesion, and truth.nii.gz in the same folder."""
    healthy = brain()
    path = tmp_path / "scan.nii.gz"
    write_nifti(path, with_lesion(healthy, LESION_MM, RADIUS_MM).array, grid(), 1, "phantom")
    truth = ball(healthy, LESION_MM, RADIUS_MM).astype(np.uint8)
    write_nifti(tmp_path / "truth.nii.gz", truth, grid(), 1, "truth")
    return path


def load_mask(path: Path) -> np.ndarray:
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return np.asarray(image.dataobj) > 0


def test_detect_writes_every_result_and_prints_the_dice(run: Run, scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = run("detect", scan, "-o", out)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir()) == sorted(REQUIRED_NAMES)
    report = json.loads((out / "report.json").read_text())
    assert report["model"]["id"] == "tiny-0.0.1"
    assert min(np.linalg.norm(np.subtract(f["centroid_mm"], LESION_MM)) for f in report["findings"]) < 3.0

    expected = dice(load_mask(out / "mask.nii.gz"), load_mask(scan.parent / "truth.nii.gz"))
    assert expected > 0.5
    assert f"Dice with truth.nii.gz: {expected:.3f}" in result.stdout
    assert report["notice"] in result.stdout


def test_detect_writes_dicom_results_of_a_dicom_folder(run: Run, tmp_path: Path) -> None:
    write_series(tmp_path / "lesion", with_lesion(brain(), LESION_MM, RADIUS_MM))
    write_series(tmp_path / "healthy", brain())
    shutil.copy(write_series(tmp_path / "scout", brain(), Series(name="scout"))[5], tmp_path / "healthy" / "scout")
    outcomes = {name: run("detect", tmp_path / name, "-o", tmp_path / f"{name}-out") for name in ("lesion", "healthy")}
    for name, result in outcomes.items():
        assert result.exit_code == 0, result.output
        written = {p.name for p in (tmp_path / f"{name}-out").iterdir()} - set(REQUIRED_NAMES)
        assert written == set(DICOM_NAMES) - ({"segmentation.dcm"} if name == "healthy" else set())
    assert "No segmentation.dcm: " in outcomes["healthy"].stdout
    assert "Left out: 1 stacks of fewer than 10 slices (1 slices, axial, z " in outcomes["healthy"].stdout
    assert "No segmentation.dcm: " not in outcomes["lesion"].stdout
    assert SECRET not in "".join(result.output for result in outcomes.values())


def test_assumptions_and_repairs_are_printed(run: Run, tmp_path: Path) -> None:
    image = nib.Nifti1Image(with_lesion(brain(), LESION_MM, RADIUS_MM).array, grid())
    image.set_sform(grid(), 0)
    image.set_qform(grid(), 0)
    image.header["pixdim"][4] = 1
    nib.save(image, tmp_path / "scan.nii")
    result = run("detect", tmp_path / "scan.nii", "-o", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (warning,) = [text for text in report["warnings"] if "left and right may be exchanged" in text]
    assert f"Warning: {warning}" in result.stdout
    assert len(report["input"]["notes"]) == 2  # position and unit
    assert all(note in result.stdout for note in report["input"]["notes"])
    chest = brain(scale=1.9, shape=(90, 110, 80), affine=grid((90, 110, 80))).array
    nib.save(nib.Nifti1Image(chest, None), tmp_path / "chest.nii")
    refused = run("detect", tmp_path / "chest.nii", "-o", tmp_path / "none")
    assert refused.exit_code == 2
    assert warning in refused.stderr


def test_json_report_is_alone_on_standard_output(run: Run, scan: Path, tmp_path: Path) -> None:
    result = run("detect", scan, "-o", tmp_path / "out", "--json", "--seed", 3, "--model", "tiny")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["model"]["seed"] == 3
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert "Dice" in result.stderr


def test_no_dice_without_a_truth(run: Run, scan: Path, tmp_path: Path) -> None:
    (scan.parent / "truth.nii.gz").unlink()
    result = run("detect", scan, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "Dice" not in result.output


def test_truth_on_another_grid_is_refused(run: Run, scan: Path, tmp_path: Path) -> None:
    truth = tmp_path / "other.nii.gz"
    write_nifti(truth, np.ones((4, 4, 4), np.uint8), np.eye(4), 1, "other")
    result = run("detect", scan, "-o", tmp_path / "out", "--truth", truth)
    assert (result.exit_code, result.stderr.split(":")[0]) == (2, "not_a_volume")


@pytest.mark.parametrize(("content", "code"), [(b"", "empty_upload"), (b"Dear doctor,\n" * 40, "not_an_image_format")])
def test_file_that_is_not_a_scan_exits_with_2(run: Run, tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(content)
    result = run("detect", path, "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr.split(":")[0]) == (2, code)
    assert "Traceback" not in result.output


def test_scan_of_another_size_exits_with_2(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "chest.nii.gz"
    write_nifti(path, brain(scale=1.9, shape=(90, 110, 80), affine=grid((90, 110, 80))).array, grid(), 1, "chest")
    result = run("detect", path, "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr.split(":")[0]) == (2, "wrong_field_of_view")


def test_other_errors_exit_with_1(run: Run, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = run("detect", scan, "-o", tmp_path / "out", "--model", "other")
    assert (unknown.exit_code, unknown.stderr.split(":")[0]) == (1, "unknown_model")
    (tmp_path / "file").touch()
    blocked = run("detect", scan, "-o", tmp_path / "file" / "out")
    assert (blocked.exit_code, blocked.stderr.split(":")[0]) == (1, "Not a directory")
    monkeypatch.setenv("COUNTERPART_MODELS", str(tmp_path))
    no_model = run("detect", scan, "-o", tmp_path / "out")
    assert (no_model.exit_code, no_model.stderr.split(":")[0]) == (1, "unknown_model")
    assert run("models").exit_code == 1


def test_unexpected_error_hides_its_text(run: Run, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr("app.analysis.infer", fail)
    result = run("detect", scan, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert re.match(r"internal_error: .*ValueError.*test_cli\.py:\d+", result.stderr)
    assert SECRET not in result.output


def test_no_message_repeats_a_file_name(run: Run, scan: Path, tmp_path: Path) -> None:
    """A file name may contain a patient's name."""
    letter, file, missing = tmp_path / f"{SECRET}.nii.gz", tmp_path / SECRET, tmp_path / f"{SECRET}-missing"
    letter.write_bytes(b"Dear doctor,\n" * 40)
    file.touch()
    out = tmp_path / "out"
    for words, status in (
        ((letter, "-o", out), 2),
        ((missing, "-o", out), 2),
        ((scan, "-o", file), 2),
        ((scan, "-o", file / "out"), 1),
        ((scan, "-o", out, "--truth", missing), 2),
        ((scan, "-o", out, "--truth", letter), 2),
    ):
        result = run("detect", *words)
        assert result.exit_code == status, result.output
        assert result.stderr
        # Typer may break a message in a frame in the middle of a word.
        assert SECRET not in "".join(filter(str.isalnum, result.output)), words


def test_invalid_setting_is_reported_without_its_value(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTERPART_PORT", "geheim")
    result = run("models")
    assert result.exit_code == 1
    assert "COUNTERPART_PORT" in result.stderr
    assert "geheim" not in result.output


def test_models_are_listed(run: Run) -> None:
    result = run("models")
    assert result.exit_code == 0
    assert result.stdout.startswith("tiny-0.0.1: Tiny Gaussian model\n  MR, T1; a skull-stripped brain\n")


def test_serve_refuses_other_machines_without_a_token(run: Run) -> None:
    result = run("serve", "--host", "0.0.0.0")  # noqa: S104
    assert (result.exit_code, result.stderr.split(":")[0]) == (1, "unsafe_exposure")


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"counterpart {__version__}\n"


def test_every_command_and_option_is_documented_and_no_other() -> None:
    sections = dict(re.findall(r"^## counterpart ([\w-]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert sections.keys() == commands.keys()
    for name, command in commands.items():
        options = {option for p in command.params for option in p.opts if option.startswith("--")}
        assert set(re.findall(r"^\| `(--[\w-]+)` \|", sections[name], re.MULTILINE)) == options


def run_python(code: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **(environ or {})}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)


def test_import_of_the_command_line_is_fast() -> None:
    """The time is only a rough check, because the machine may be busy."""
    shortest = 9.9
    for _ in range(5):
        start = time.perf_counter()
        done = run_python(f"import sys, app.cli; print([m for m in {HEAVY_MODULES} if m in sys.modules])")
        shortest = min(shortest, time.perf_counter() - start)
        assert done.stdout.strip() == "[]"
        if shortest < HELP_SECONDS:
            break
    assert shortest < BUSY_FACTOR * HELP_SECONDS


def test_detect_writes_a_label_map_by_setting(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTERPART_SEG_TYPE", "labelmap")
    write_series(tmp_path / "series", with_lesion(brain(), LESION_MM, RADIUS_MM))
    assert run("detect", tmp_path / "series", "-o", tmp_path / "out").exit_code == 0
    assert pydicom.dcmread(tmp_path / "out" / "segmentation.dcm").SegmentationType == "LABELMAP"


def imported_by(words: list[str], modules: tuple[str, ...], environ: dict[str, str] | None = None) -> list[str]:
    """Return those of the modules that a command imports."""
    code = (
        f"import sys\nfrom app.cli import main\nsys.argv = ['counterpart', *{words!r}]\ntry:\n    main()\n"
        f"except SystemExit:\n    print('\\n', *(m for m in {modules} if m in sys.modules))"
    )
    return run_python(code, environ).stdout.splitlines()[-1].split()


def test_help_imports_no_heavy_module() -> None:
    assert imported_by(["--help"], HEAVY_MODULES) == []


def test_detect_on_nifti_imports_no_dicom_library(tiny_models: Path, scan: Path, tmp_path: Path) -> None:
    words = ["detect", str(scan), "-o", str(tmp_path / "out")]
    dicom_libraries = ("pydicom", "highdicom", "gdcm", "requests")
    assert imported_by(words, dicom_libraries, {"COUNTERPART_MODELS": str(tiny_models)}) == []
    assert (tmp_path / "out" / "mask.nii.gz").is_file()


def test_results_inside_the_folder_of_the_scan_do_not_change_the_next_run(run: Run, tmp_path: Path) -> None:
    series = tmp_path / "series"
    write_series(series, with_lesion(brain(), LESION_MM, RADIUS_MM))
    reports, masks = [], []
    for _ in range(2):
        assert run("detect", series, "-o", series / "result").exit_code == 0
        reports.append(json.loads((series / "result" / "report.json").read_text()))
        masks.append((series / "result" / "mask.nii.gz").read_bytes())
    assert masks[0] == masks[1]
    assert reports[0]["input"] == reports[1]["input"]
    assert (series / "result" / "segmentation.dcm").is_file()
