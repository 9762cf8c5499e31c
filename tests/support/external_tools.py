"""External programs that read or validate DICOM objects. A test is skipped if its program is not installed."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Tool = Callable[..., str]
# Debian packages, except dcmqi, which the `dev` extra installs.
PACKAGES = {
    "dciodvfy": "dicom3tools",
    "dcentvfy": "dicom3tools",
    "dsrdump": "dcmtk",
    "dcm2xml": "dcmtk",
    "dcm2pnm": "dcmtk",
    "dcmdump": "dcmtk",
    "segimage2itkimage": "dcmqi",
    "tid1500reader": "dcmqi",
}


def require_tool(name: str) -> Tool:
    """Return a function that runs a program and returns its output, or skip the test.

    The program must exit with 0 unless `check=False`.
    """
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{name} is not installed ({PACKAGES.get(name, name)})")

    def run(*arguments: object, check: bool = True) -> str:
        done = subprocess.run(
            [path, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        output = done.stdout.decode("utf-8", "replace")
        assert not check or done.returncode == 0, output
        return output

    return run
