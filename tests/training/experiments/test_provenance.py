"""Code versions, and the hashes of the settings that determine a result."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from app.manifest import File, Manifest
from tests.support.bundle import tiny_manifest
from training.experiments.experiment import code_version
from training.experiments.manifests import cases_hash, changed, codes_hash, detection_hash, ood_hash

GIT = shutil.which("git") or ""
pytestmark = [pytest.mark.training, pytest.mark.skipif(not GIT, reason="git is not installed")]
FILE = File(name="other.onnx", sha256="1" * 64)


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


@pytest.mark.parametrize(
    ("name", "suffix"), [("docs/results/row.json", ""), ("app/api.py", "-dirty"), ("app/new.py", "-dirty")]
)
def test_only_changed_code_is_dirty(repository: Path, name: str, suffix: str) -> None:
    (repository / name).write_text("second")
    assert code_version(repository) == git(repository, "rev-parse", "--short", "HEAD") + suffix


def test_version_outside_of_a_repository_is_unknown(tmp_path: Path) -> None:
    assert code_version(tmp_path) == "unknown"


CHANGES: dict[str, Callable[[Manifest], Manifest]] = {
    "version": lambda m: changed(m, version="9.9.9", title="other"),
    "advice": lambda m: changed(m, preprocessing=changed(m.preprocessing, advice="Send another.")),
    "ood": lambda m: changed(m, ood=changed(m.ood, max_outlier_fraction=0.5)),
    "kl": lambda m: changed(m, kl=changed(m.kl, threshold=0.5)),
    "residual": lambda m: changed(m, residual=changed(m.residual, median_pixels=3)),
    "method": lambda m: changed(m, method="another"),
    "seed": lambda m: changed(m, seed=8),
    "denoiser": lambda m: changed(m, files=changed(m.files, denoiser=FILE)),
    "VQ-VAE": lambda m: changed(m, files=changed(m.files, encoder=FILE)),
    "slices": lambda m: changed(m, preprocessing=changed(m.preprocessing, intensity_level=0.5)),
    "edge": lambda m: changed(m, residual=changed(m.residual, erosion=3)),
}
# Hashes that change: cases, codes, detection, out-of-distribution check.
EXPECTED = {
    "version": "",
    "advice": "",
    "ood": "ood",
    "kl": "detection",
    "residual": "detection",
    "method": "detection",
    "seed": "detection",
    "denoiser": "detection",
    "VQ-VAE": "codes detection",
    "slices": "cases codes detection",
    "edge": "cases codes detection",
}
HASHES: dict[str, Callable[[Manifest], str]] = {
    "cases": cases_hash,
    "codes": codes_hash,
    "detection": detection_hash,
    "ood": ood_hash,
}


@pytest.mark.parametrize("change", CHANGES)
def test_hashes_change_with_their_settings(change: str) -> None:
    manifest = tiny_manifest()
    other = CHANGES[change](manifest)
    differ = [name for name, hash_of in HASHES.items() if hash_of(other) != hash_of(manifest)]
    assert differ == EXPECTED[change].split()


def test_hashes_of_the_shipped_bundles_are_those_of_the_stored_results() -> None:
    """Renaming a field of the manifest must not invalidate the stored results."""
    for part, bundle in (("shapes", "t1"), ("ellipses", "headct"), ("tumours", "flair")):
        root = Path(__file__).parents[3]
        stored = json.loads((root / "docs" / "results" / f"{part}.json").read_text())["provenance"]
        folder = root / "models" / stored["bundle"]
        if not folder.is_dir():
            continue  # measured with an earlier version
        manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
        for name in ("cases", "codes", "detection"):
            assert stored[f"{name}_sha256"] == HASHES[name](manifest), (bundle, name)


def test_unknown_field_cannot_be_changed() -> None:
    with pytest.raises(AssertionError):
        changed(tiny_manifest(), no_such_field=1)
