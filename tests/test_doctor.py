"""What the doctor finds, and that it says how to mend it."""

import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from pydicom.pixels.decoders.base import get_decoder
from rich.console import Console
from typer.testing import CliRunner

from app import doctor
from app.cli import app
from app.doctor import Check, run_checks, print_checks
from app.settings import Settings


@pytest.fixture
def settings(tiny_models: Path, tmp_path: Path) -> Callable[..., Settings]:
    def make(**arguments: object) -> Settings:
        return Settings(**{"models": tiny_models, "store": str(tmp_path / "store"), **arguments})

    return make


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_sound_installation_passes_every_check(settings: Callable[..., Settings], tmp_path: Path) -> None:
    checks = run_checks(settings())
    assert [c for c in checks if c.status == "fail"] == []
    assert [c.name for c in checks if c.name.startswith("decoder")] == [
        "decoder JPEG",
        "decoder JPEG lossless",
        "decoder JPEG-LS",
        "decoder JPEG 2000",
        "decoder HTJ2K",
        "decoder RLE",
    ]
    assert {c.status for c in checks if c.name.startswith("decoder")} == {"ok"}
    assert by_name(checks)["provider"].found == "cpu: CPUExecutionProvider"
    assert by_name(checks)["model tiny-0.0.1"].status == "ok"
    assert not (tmp_path / "store").exists()  # looking changes nothing


def test_a_provider_that_is_not_there_fails(settings: Callable[..., Settings]) -> None:
    checks = by_name(run_checks(settings(provider="cuda")))
    for name in ("provider", "model tiny-0.0.1"):
        assert checks[name].status == "fail"
        assert checks[name].found.startswith("provider_unavailable: ")
        assert "COUNTERPART_PROVIDER=cpu" in checks[name].mend


def test_a_changed_bundle_fails(settings: Callable[..., Settings], tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models, tmp_path / "models")
    with (tmp_path / "models" / "tiny-0.0.1" / "golden.npz").open("ab") as golden:
        golden.write(b"!")
    check = by_name(run_checks(settings(models=tmp_path / "models")))["model tiny-0.0.1"]
    assert check.status == "fail"
    assert "golden.npz is not the file of the manifest" in check.found


def test_no_bundle_fails(settings: Callable[..., Settings], tmp_path: Path) -> None:
    check = by_name(run_checks(settings(models=tmp_path)))["models"]
    assert (check.status, check.found) == ("fail", f"none in {tmp_path}")


def test_two_runtimes_fail(settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _: "1.31.0")
    check = doctor.check_runtime(settings())
    assert (check.status, check.found) == ("fail", "onnxruntime 1.31.0, onnxruntime-gpu 1.31.0")
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    assert doctor.check_runtime(settings(provider="cuda")).mend == "pip install 'counterpart[gpu]'."


def test_a_missing_decoder_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_decoder("1.2.840.10008.1.2.5")), "is_available", property(lambda _: False))
    checks = list(doctor.check_decoders())
    assert {c.status for c in checks} == {"warn"}
    assert all("pip install" in c.mend for c in checks)


def test_a_store_that_cannot_be_written_fails(settings: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check = doctor.check_store(settings(store=str(tmp_path / "file")))
    assert check.status == "fail"
    assert "COUNTERPART_STORE" in check.mend


@pytest.mark.parametrize(("free_gb", "status"), [(50.0, "ok"), (5.0, "warn"), (0.5, "fail")])
def test_free_disk(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, free_gb: float, status: str
) -> None:
    usage = shutil.disk_usage("/")._replace(free=int(free_gb * 1e9))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    check = doctor.check_store(settings())
    assert check.status == status
    assert f"{free_gb:.1f} GB free" in check.found


def test_settings_are_shown_with_their_origin_and_without_secrets(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERPART_TOKEN", "geheim-token")
    monkeypatch.setenv("COUNTERPART_DATABASE", "postgresql://user:geheim-word@host/db")
    screen = StringIO()
    print_checks([Check("one", "warn", "found [this]", "mend [that]")], settings(port=8123), Console(file=screen, width=200))
    text = screen.getvalue()
    assert "geheim" not in text
    assert "found [this]" in text
    assert "mend: mend [that]" in text
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if "COUNTERPART_" in line and "│" in line}
    assert "environment" in rows["COUNTERPART_TOKEN"]
    assert "argument" in rows["COUNTERPART_PORT"]
    assert "default" in rows["COUNTERPART_HOST"]
    assert set(rows) == {f"COUNTERPART_{name.upper()}" for name in Settings.model_fields}


def test_the_command_leaves_with_1_where_something_fails(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERPART_STORE", str(tmp_path))
    monkeypatch.setenv("COUNTERPART_MODELS", str(tiny_models))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    monkeypatch.setenv("COUNTERPART_MODELS", str(tmp_path))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1
