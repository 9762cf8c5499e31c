"""What is shipped: dependencies, the wheel and its bundles, the image's promises, and documents that keep up."""

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
from typer.main import get_command

from app import __version__
from app.cli import app
from app.settings import PREFIX, SETTINGS_FILE_VARIABLE, Settings

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

# Found by other libraries when pixels are decoded, never imported by ours.
DECODERS = {"python-gdcm", "pylibjpeg", "pylibjpeg-openjpeg", "pyjpegls"}
# Variables with the prefix that are no settings of the service.
OTHER_VARIABLES = {SETTINGS_FILE_VARIABLE, f"{PREFIX}DATA"}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(r).name) for r in requirements}


def imported(folder: str) -> set[str]:
    """Distributions whose modules a folder's code imports, its own packages and the standard library aside."""
    owners = metadata.packages_distributions()
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for module in _modules(ast.parse(path.read_text())):
            if module not in sys.stdlib_module_names and module not in {"app", "training", "tests"}:
                found |= {canonicalize_name(owner) for owner in owners.get(module, [module])}
    return found


def _modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_the_service_declares_what_it_imports_and_nothing_else() -> None:
    declared = names(PROJECT["dependencies"])
    used = imported("app") - {"onnxruntime"}  # comes with one of two extras
    assert used - declared == set()
    assert declared - used - DECODERS == set()


def test_training_declares_what_it_imports() -> None:
    declared = names(PROJECT["dependencies"] + EXTRAS["training"])
    assert imported("training") - declared == set()


def test_the_service_needs_neither_torch_nor_a_runtime_of_its_own_choice() -> None:
    core = names(PROJECT["dependencies"])
    assert core.isdisjoint({"torch", "monai", "onnxruntime", "onnxruntime-gpu", "pylibjpeg-libjpeg"})
    assert names(EXTRAS["cpu"]) == {"onnxruntime"}
    assert names(EXTRAS["gpu"]) == {"onnxruntime-gpu"}


def test_the_service_imports_no_torch() -> None:
    """Here it is installed, so an import would be seen."""
    code = "import sys, app.main, app.console, app.doctor; print({'torch', 'monai', 'onnx'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_constraints_are_exact_and_within_the_ranges() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), lines
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for text in [*PROJECT["dependencies"], *(r for extra in EXTRAS.values() for r in extra)]:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{version} is outside {text}"


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


def test_the_wheel_holds_the_service_and_its_bundles(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        entry_points = archive.read(f"counterpart-{__version__}.dist-info/entry_points.txt").decode()
        described = archive.read(f"counterpart-{__version__}.dist-info/METADATA").decode()
    bundles = {p.relative_to(ROOT / "models") for p in (ROOT / "models").rglob("*") if p.is_file()}
    assert {f"app/_models/{p.as_posix()}" for p in bundles} == {n for n in held if n.startswith("app/_models/")}
    assert {n.split("/")[0] for n in held} == {"app", f"counterpart-{__version__}.dist-info"}
    assert "counterpart = app.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in described
    assert f"counterpart-{__version__}.dist-info/licenses/LICENSE" in held


def test_an_installed_service_finds_its_bundles_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "site" / "app" / "_models").mkdir(exist_ok=True)
    code = "from app.runtime.bundle import shipped_models; print(shipped_models())"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert Path(out.stdout.strip()) == tmp_path / "site" / "app" / "_models"


def test_the_changelog_is_at_the_version() -> None:
    versions = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert versions[0] == __version__


def test_the_image_runs_as_a_user_and_looks_after_its_health() -> None:
    last = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-1]
    assert re.search(r"^USER counterpart$", last, re.MULTILINE)
    assert last.index("USER counterpart") < last.index("ENTRYPOINT")
    assert "/readyz" in last
    assert "VOLUME /var/lib/counterpart" in last


def test_the_documents_name_every_command_and_setting_and_no_other() -> None:
    text = "\n".join(p.read_text() for p in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"\bcounterpart ([a-z]+) ", text)) & (commands | {"worker"}) == commands
    variables = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(rf"{PREFIX}[A-Z_]+\b", text)) - OTHER_VARIABLES == variables


def test_make_targets_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"run", "test"} <= named <= targets
