"""What a row says of the code that measured it."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch")

from training.experiments.experiment import code_version

GIT = shutil.which("git") or ""
pytestmark = [pytest.mark.training, pytest.mark.skipif(not GIT, reason="git is not installed")]


def git(root: Path, *words: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    done = subprocess.run([GIT, *identity, *words], cwd=root, capture_output=True, check=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("app/api.py", "docs/results/row.json", "pyproject.toml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def test_a_result_that_is_not_committed_yet_is_no_change_of_the_code(repository: Path) -> None:
    (repository / "docs/results/row.json").write_text("second")
    assert code_version(repository) == git(repository, "rev-parse", "--short", "HEAD")


@pytest.mark.parametrize("name", ["app/api.py", "app/new.py"])
def test_code_that_is_not_committed_yet_is_told(repository: Path, name: str) -> None:
    (repository / name).write_text("second")
    assert code_version(repository) == git(repository, "rev-parse", "--short", "HEAD") + "-dirty"


def test_outside_of_a_repository_it_is_unknown(tmp_path: Path) -> None:
    assert code_version(tmp_path) == "unknown"
