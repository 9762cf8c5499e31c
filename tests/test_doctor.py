"""Checks of `counterpart doctor`, their fixes, and its output."""

import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from pydicom.pixels.decoders.base import get_decoder
from rich.console import Console
from typer.testing import CliRunner

from app import doctor
from app.check_output import Check, print_checks, print_settings
from app.cli import app
from app.doctor import run_checks
from app.settings import Settings


@pytest.fixture
def settings(tiny_models: Path, tmp_path: Path) -> Callable[..., Settings]:
    def create(**arguments: object) -> Settings:
        return Settings(**{"models": tiny_models, "store": str(tmp_path / "store"), **arguments})

    return create


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_correct_installation_passes_every_check(settings: Callable[..., Settings], tmp_path: Path) -> None:
    checks = by_name(run_checks(settings()))
    assert [c for c in checks.values() if c.status == "fail"] == []
    methods = ("JPEG", "JPEG lossless", "JPEG-LS", "JPEG 2000", "HTJ2K", "RLE")
    decoders = {name: c.status for name, c in checks.items() if name.startswith("decoder")}
    assert decoders == {f"decoder {method}": "ok" for method in methods}
    assert checks["provider"].found == "cpu: CPUExecutionProvider"
    assert checks["model tiny-0.0.1"].status == "ok"
    assert not (tmp_path / "store").exists(), "a check must not create the store"


def test_unavailable_provider_fails(settings: Callable[..., Settings]) -> None:
    checks = by_name(run_checks(settings(provider="cuda")))
    for name in ("provider", "model tiny-0.0.1"):
        assert checks[name].status == "fail"
        assert checks[name].found.startswith("provider_unavailable: ")
        assert "COUNTERPART_PROVIDER=cpu" in checks[name].fix


def test_damaged_bundle_fails(settings: Callable[..., Settings], tiny_models: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_models, tmp_path / "models")
    with (tmp_path / "models" / "tiny-0.0.1" / "golden.npz").open("ab") as golden:
        golden.write(b"!")
    check = by_name(run_checks(settings(models=tmp_path / "models")))["model tiny-0.0.1"]
    assert check.status == "fail"
    assert "golden.npz" in check.found


def test_folder_without_bundles_fails(settings: Callable[..., Settings], tmp_path: Path) -> None:
    check = by_name(run_checks(settings(models=tmp_path)))["models"]
    assert (check.status, check.found) == ("fail", f"none in {tmp_path}")


def test_two_runtimes_or_none_fail(settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _: "1.31.0")
    check = doctor.check_runtime(settings())
    assert (check.status, check.found) == ("fail", "onnxruntime 1.31.0, onnxruntime-gpu 1.31.0")
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    check = doctor.check_runtime(settings(provider="cuda"))
    assert (check.status, check.fix) == ("fail", "pip install 'counterpart[gpu]'.")


def test_missing_decoder_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_decoder("1.2.840.10008.1.2.5")), "is_available", property(lambda _: False))
    checks = list(doctor.check_decoders())
    assert {c.status for c in checks} == {"warn"}
    assert all("pip install" in c.fix for c in checks)


def test_store_that_is_not_writable_fails(settings: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check = doctor.check_store(settings(store=str(tmp_path / "file")))
    assert check.status == "fail"
    assert "COUNTERPART_STORE" in check.fix


def test_open_store_is_a_warning(settings: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o755)  # `mkdir` would subtract the umask
    check = doctor.check_store(settings())
    assert (check.status, "open to other users" in check.found) == ("warn", True)
    (tmp_path / "store").chmod(0o700)
    assert "open to" not in doctor.check_store(settings()).found


def test_damaged_sqlite_file_fails(settings: Callable[..., Settings], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o700)
    file = tmp_path / "store" / "jobs.sqlite"
    file.touch()
    assert [c.status for c in doctor.check_shared(settings())] == ["ok"]
    file.write_bytes(b"no database" * 1000)
    (check,) = doctor.check_shared(settings())
    assert (check.status, "damaged" in check.found) == ("fail", True)


def test_password_is_not_printed(settings: Callable[..., Settings]) -> None:
    database = "postgresql://127.0.0.1:1/db?user=me&password=geheim"
    checks = [
        *doctor.check_shared(settings(database=database)),
        *doctor.check_shared(settings(database=database + "x:y")),
    ]
    assert {check.status for check in checks} == {"fail"}
    assert "geheim" not in repr(checks)


@pytest.mark.parametrize(("free_gb", "status"), [(50.0, "ok"), (5.0, "warn"), (0.5, "fail")])
def test_free_disk_space_is_checked(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, free_gb: float, status: str
) -> None:
    usage = shutil.disk_usage("/")._replace(free=int(free_gb * 1e9))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    check = doctor.check_store(settings())
    assert check.status == status
    assert f"{free_gb:.1f} GB free" in check.found


def test_settings_are_printed_with_their_origin_and_without_secrets(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERPART_TOKEN", "geheim-token")
    monkeypatch.setenv("COUNTERPART_DATABASE", "postgresql://user:geheim-word@host/db")
    screen = StringIO()
    print_settings(settings(port=8123), Console(file=screen, width=200))
    assert "geheim" not in screen.getvalue()
    lines = {line.split(" = ")[0]: line for line in screen.getvalue().splitlines() if " = " in line}
    assert lines["COUNTERPART_TOKEN"].endswith("(environment)")
    assert lines["COUNTERPART_PORT"] == "COUNTERPART_PORT = 8123 (argument)"
    assert lines["COUNTERPART_HOST"].endswith("(default)")
    assert set(lines) == {f"COUNTERPART_{name.upper()}" for name in Settings.model_fields}


def test_output_fits_80_columns(settings: Callable[..., Settings], tmp_path: Path) -> None:
    screen = StringIO()
    console = Console(file=screen, width=80)
    print_checks(
        [*run_checks(settings(provider="cuda")), Check("one", "warn", "[this] " * 30, "[that] " * 30)], console
    )
    print_settings(settings(store=str(tmp_path / ("long" * 40))), console)
    assert max(len(line) for line in screen.getvalue().splitlines()) <= 80
    assert screen.getvalue().count("[this]") == screen.getvalue().count("[that]") == 30, "read as markup"


def test_command_exits_with_1_if_a_check_fails(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERPART_STORE", str(tmp_path))
    monkeypatch.setenv("COUNTERPART_MODELS", str(tiny_models))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    monkeypatch.setenv("COUNTERPART_MODELS", str(tmp_path))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1
