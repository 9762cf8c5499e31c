"""Programs of an active virtual environment do not replace those of the system."""

import os
import shutil
from pathlib import Path

from tests.support.search_path import without_environments


def make_program(folder: Path) -> Path:
    """Make an executable file with the name of a program of dcmtk."""
    folder.mkdir(parents=True)
    path = folder / "storescu"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_programs_of_the_system_are_found_in_an_active_environment(tmp_path: Path) -> None:
    make_program(tmp_path / "environment" / "bin")
    (tmp_path / "environment" / "pyvenv.cfg").touch()
    wanted = make_program(tmp_path / "usr" / "bin")
    path = os.pathsep.join([str(tmp_path / "environment" / "bin"), str(wanted.parent)])
    assert shutil.which("storescu", path=without_environments(path)) == str(wanted)


def test_search_path_of_the_tests_has_no_environment() -> None:
    assert os.environ["PATH"] == without_environments(os.environ["PATH"])
