"""External programs of tests. A test is skipped if its program is not installed, or not allowed on this machine."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

Tool = Callable[..., str]
# Exit status of a script that needs a program that is not installed. It prints which one.
NOT_INSTALLED = 3
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


def run_or_skip(command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script that starts its programs in a network namespace, and return the finished process.

    The test is skipped if a program of the script is not installed, or if this machine allows no namespace. It fails if
    the script fails for another reason.

    Parameters
    ----------
    command : sequence of str
    **options
        Of `subprocess.run`.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode == NOT_INSTALLED:
        pytest.skip(done.stdout.strip())
    if "unshare failed" in done.stderr:
        pytest.skip(f"this machine allows no network namespace, run the test as root: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


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
