"""The check of licences refuses what can only be used under the GPL, and what states no licence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "deploy" / "licences.py"
pytest.importorskip("license_expression")


def check(folder: Path, *licences: dict[str, Any], name: str = "package") -> subprocess.CompletedProcess[str]:
    sbom = folder / "sbom.json"
    component = {"name": name, "version": "1.0", "licenses": list(licences)}
    sbom.write_text(json.dumps({"components": [component]}))
    return subprocess.run([sys.executable, str(SCRIPT), str(sbom)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "licence",
    [
        {"expression": "Apache-2.0 OR GPL-2.0-only"},
        {"expression": "BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1"},
        {"license": {"id": "LGPL-3.0-only"}},
        {"license": {"name": "License :: OSI Approved :: GNU Lesser General Public License v3 (LGPLv3)"}},
        {"license": {"name": "License :: OSI Approved :: BSD License"}},
        {"license": {"id": "MIT-CMU"}},
    ],
)
def test_licence_is_listed(tmp_path: Path, licence: dict[str, Any]) -> None:
    done = check(tmp_path, licence)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| package | 1.0 | " in done.stdout


@pytest.mark.parametrize(
    "licence",
    [
        {"license": {"id": "GPL-3.0-only"}},
        {"license": {"id": "AGPL-3.0-or-later"}},
        {"expression": "MIT AND GPL-2.0-or-later"},
        {"expression": "MIT AND (GPL-2.0-or-later OR AGPL-3.0-only)"},
        {"license": {"name": "License :: OSI Approved :: GNU General Public License v3 (GPLv3)"}},
        {"license": {"name": "License :: OSI Approved :: GNU Affero General Public License v3"}},
    ],
)
def test_gpl_fails(tmp_path: Path, licence: dict[str, Any]) -> None:
    done = check(tmp_path, licence)
    assert done.returncode == 1
    assert done.stderr.startswith("package: ")


def test_missing_licence_fails(tmp_path: Path) -> None:
    assert check(tmp_path).returncode == 1
    assert check(tmp_path, name="protobuf").returncode == 0
