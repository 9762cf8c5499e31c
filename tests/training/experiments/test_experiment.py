"""What a row says of the code that measured it."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch")

from app.manifest import File
from tests.support.bundle import tiny_manifest, with_part
from training.experiments.experiment import cases_hash, code_version, codes_hash, detection_hash

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


def test_a_gate_a_word_or_a_version_leaves_what_was_measured() -> None:
    manifest = tiny_manifest()
    same = with_part(manifest, "gate", max_outlier_fraction=0.5, max_outlier_slice_fraction=0.5)
    same = with_part(same, "provenance", denoiser_steps=9).model_copy(update={"version": "9.9.9", "title": "other"})
    assert detection_hash(same) == detection_hash(manifest)


@pytest.mark.parametrize("part", ["kl", "residual", "preparation", "seed", "files"])
def test_what_decides_a_map_does_not(part: str) -> None:
    manifest = tiny_manifest()
    other = {
        "kl": with_part(manifest, "kl", threshold=0.5),
        "residual": with_part(manifest, "residual", median_pixels=3),
        "preparation": with_part(manifest, "preparation", min_foreground_cm2=1.0),
        "seed": manifest.model_copy(update={"seed": 8}),
        "files": with_part(manifest, "files", decoder=File(name="decoder.onnx", sha256="1" * 64)),
    }[part]
    assert detection_hash(other) != detection_hash(manifest)


def test_opponents_outlive_a_denoiser_and_those_that_read_no_codes_a_vqvae() -> None:
    manifest = tiny_manifest()
    file = File(name="other.onnx", sha256="1" * 64)
    denoiser, vqvae = with_part(manifest, "files", denoiser=file), with_part(manifest, "files", encoder=file)
    slices = with_part(manifest, "preparation", intensity_level=0.5)
    words = with_part(manifest, "preparation", advice="Send another.")
    edge = with_part(manifest, "residual", erosion=3)
    told = {
        name: [of(m) != of(manifest) for of in (cases_hash, codes_hash, detection_hash)]
        for name, m in {"denoiser": denoiser, "vqvae": vqvae, "slices": slices, "words": words, "edge": edge}.items()
    }
    assert told == {
        "denoiser": [False, False, True],
        "vqvae": [False, True, True],
        "slices": [True, True, True],
        "words": [False, False, True],
        "edge": [True, True, True],
    }
