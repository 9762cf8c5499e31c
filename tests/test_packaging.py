"""Dependencies, constraints, the wheel and its bundles, the image, the changelog and the make targets."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app import __version__

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

# pydicom imports them to decode pixels; Counterpart does not.
DECODERS = {"python-gdcm", "pylibjpeg", "pylibjpeg-openjpeg", "pyjpegls"}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(r).name) for r in requirements}


def imported(folder: str) -> set[str]:
    """Return the distributions that the code of a folder imports."""
    owners = metadata.packages_distributions()
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for module in imported_modules(ast.parse(path.read_text())):
            if module not in sys.stdlib_module_names and module not in {"app", "training", "tests"}:
                found |= {canonicalize_name(owner) for owner in owners.get(module, [module])}
    return found


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_service_declares_exactly_its_imports() -> None:
    declared = names(PROJECT["dependencies"])
    # onnxruntime comes from one of two extras. The packages of OpenTelemetry share a name, and have an extra.
    used = {name for name in imported("app") - {"onnxruntime"} if not name.startswith("opentelemetry")}
    assert used - declared == set()
    assert declared - used - DECODERS == set()


def test_training_declares_its_imports() -> None:
    declared = names(PROJECT["dependencies"] + EXTRAS["training"])
    assert imported("training") - declared == set()


def test_core_dependencies_have_no_torch_and_no_runtime() -> None:
    core = names(PROJECT["dependencies"])
    assert core.isdisjoint({"torch", "monai", "onnxruntime", "onnxruntime-gpu", "pylibjpeg-libjpeg"})
    assert names(EXTRAS["cpu"]) == {"onnxruntime"}
    assert names(EXTRAS["gpu"]) == {"onnxruntime-gpu"}


def test_service_does_not_import_torch() -> None:
    code = "import sys, app.main, app.console, app.doctor; print({'torch', 'monai', 'onnx'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_start_of_the_service_imports_only_what_every_service_needs() -> None:
    """PyJWT, the DICOM network, the writers of DICOM, clients and traces come with the first use or by a setting."""
    later = {"jwt", "cryptography", "pynetdicom", "highdicom", "dicomweb_client", "opentelemetry.sdk", "onnxruntime"}
    code = f"import sys, app.main; print(sorted({later!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_constraints_are_exact_and_in_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), lines
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for text in [*PROJECT["dependencies"], *(r for extra in EXTRAS.values() for r in extra)]:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{version} is outside {text}"


@pytest.mark.parametrize("name", ["build", "cpu", "gpu"])
def test_requirements_of_the_image_have_hashes_and_the_versions_of_the_constraints(name: str) -> None:
    text = (ROOT / "deploy" / "requirements" / f"{name}.txt").read_text()
    assert "://" not in text
    blocks = re.findall(r"^(\S+)==(\S+).*\\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    assert len(blocks) == len(re.findall(r"^\S+==", text, re.MULTILINE))
    required = {canonicalize_name(package): version for package, version, _ in blocks}
    lines = (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    pinned = {canonicalize_name(package): version for package, _, version in lines}
    assert {p: v for p, v in required.items() if pinned.get(p, v) != v} == {}
    declared = {"build": ["hatchling"]}.get(name, [*PROJECT["dependencies"], *EXTRAS.get(name, []), *EXTRAS["otel"]])
    assert names(declared) <= set(required)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_wheel_contains_the_service_and_its_bundles(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        entry_points = archive.read(f"counterpart-{__version__}.dist-info/entry_points.txt").decode()
        description = archive.read(f"counterpart-{__version__}.dist-info/METADATA").decode()
    bundles = {p.relative_to(ROOT / "models") for p in (ROOT / "models").rglob("*") if p.is_file()}
    bundles = {p for p in bundles if "pinaya2022" not in p.parts[0]}  # baselines for comparisons of methods
    assert {f"app/_models/{p.as_posix()}" for p in bundles} == {n for n in files if n.startswith("app/_models/")}
    assert {n.split("/")[0] for n in files} == {"app", f"counterpart-{__version__}.dist-info"}
    assert "counterpart = app.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in description
    assert f"counterpart-{__version__}.dist-info/licenses/LICENSE" in files


def test_installed_service_finds_its_bundles(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "site" / "app" / "_models").mkdir(exist_ok=True)
    code = "from app.runtime.bundle import shipped_models; print(shipped_models())"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert Path(out.stdout.strip()) == tmp_path / "site" / "app" / "_models"


def test_changelog_has_the_version() -> None:
    versions = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert versions[0] == __version__


def test_image_has_a_user_a_volume_and_a_health_check() -> None:
    last = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-1]
    # Kubernetes cannot verify that a user who is given by name is not root.
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", last, re.MULTILINE)
    assert last.index("\nUSER ") < last.index("ENTRYPOINT")
    assert "/readyz" in last
    assert "VOLUME /var/lib/counterpart" in last


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"run", "test"} <= named <= targets
