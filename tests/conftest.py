"""Fixtures of all tests: a clean environment, a tiny bundle, and the real scans if there are any."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.pipeline import brain_extraction
from tests.support.bundle import write_tiny_bundle
from tests.support.search_path import leave_environments

leave_environments()

DATA_VARIABLE = "COUNTERPART_DATA"
CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hide the settings and the store of the developer from the tests."""
    for name in os.environ:
        if name.startswith("COUNTERPART_") and name != DATA_VARIABLE:
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.getbasetemp() / "data-home"))


@pytest.fixture(autouse=True)
def _restore_umask() -> Iterator[None]:
    """Restore the umask, which `counterpart serve` sets for its process."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one bundle: exact Gaussian networks as ONNX graphs."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def small_cubes() -> Iterator[None]:
    """Run brain extraction on small cubes. They are fine enough for the phantom."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brain_extraction, "COARSE_SIDE", 48)
        patch.setattr(brain_extraction, "FINE_SIDE", 72)
        yield


@pytest.fixture(scope="session")
def real_scans() -> Path:
    """Return the folder of the real scans. Without it, the test is skipped."""
    folder = Path(os.environ.get(DATA_VARIABLE, CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real scans: {DATA_VARIABLE} does not name a folder")
    return folder
