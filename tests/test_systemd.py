"""The systemd units: systemd accepts them, their exposure is low, and they name settings and commands that exist."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from app.cli import app
from app.settings import PREFIX, SECRETS_FOLDER_VARIABLE, Settings

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "systemd"
UNITS = ["counterpart.service", "counterpart-worker@.service", "counterpart-node.service"]
# From 0, no exposure, to 10, as `systemd-analyze security` computes it.
MAX_EXPOSURE = 1.5


def analyse(*arguments: object) -> str:
    path = shutil.which("systemd-analyze")
    if path is None:
        pytest.skip("systemd-analyze is not installed (systemd)")
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def values(unit: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", (FOLDER / unit).read_text(), re.MULTILINE)


@pytest.fixture(params=UNITS)
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a unit whose program exists."""
    unit: Path = tmp_path / request.param.replace("@.", "@1.")
    text = (FOLDER / request.param).read_text()
    assert "ExecStart=/opt/counterpart/bin/counterpart " in text
    unit.write_text(text.replace("/opt/counterpart/bin/counterpart", sys.executable))
    return unit


def test_systemd_accepts_the_unit(installed: Path) -> None:
    assert analyse("verify", installed) == ""


def test_exposure_is_low(installed: Path) -> None:
    analyse("security", "--offline=yes", f"--threshold={int(MAX_EXPOSURE * 10)}", installed)


@pytest.mark.parametrize("unit", UNITS)
def test_settings_and_commands_exist(unit: str) -> None:
    (start,) = values(unit, "ExecStart")
    command, *options = start.split()[1:]
    get_command(app).commands[command].make_context(command, options)  # type: ignore[attr-defined]
    assignments = " ".join(values(unit, "Environment")).split()
    settings = dict(assignment.split("=", 1) for assignment in assignments)
    known = {f"{PREFIX}{field.upper()}" for field in Settings.model_fields} | {SECRETS_FOLDER_VARIABLE}
    assert set(settings) <= known
    # systemd mounts the credentials in this folder.
    assert settings[SECRETS_FOLDER_VARIABLE] == "%d"
    credentials = [value.split(":")[0] for value in values(unit, "LoadCredential")]
    assert {name.upper() for name in credentials} <= known
    (grace,) = values(unit, "TimeoutStopSec")
    assert int(grace) >= int(settings["COUNTERPART_DRAIN_SECONDS"]) + 20
