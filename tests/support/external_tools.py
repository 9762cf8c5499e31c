"""Tools of others that judge what was written; where one is not installed, its test is skipped."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Tool = Callable[..., str]
# Where to find each: Debian's dicom3tools and dcmtk, dcmqi of the developer's extra.
PACKAGES = {
    "dciodvfy": "dicom3tools",
    "dcentvfy": "dicom3tools",
    "dsrdump": "dcmtk",
    "dcm2xml": "dcmtk",
    "dcmdump": "dcmtk",
    "segimage2itkimage": "dcmqi",
    "tid1500reader": "dcmqi",
}


def tool(name: str) -> Tool:
    """Call a program and take all that it says; it must end with 0 unless `check=False`."""
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{name} is not installed ({PACKAGES.get(name, name)})")

    def call(*arguments: object, check: bool = True) -> str:
        done = subprocess.run(
            [path, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        said = done.stdout.decode("utf-8", "replace")
        assert not check or done.returncode == 0, said
        return said

    return call
