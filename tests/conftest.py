"""What every test stands on: a clean environment, a tiny real bundle, and the real scans where they are."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.pipeline import brain_extraction
from tests.support.bundle import write_tiny_bundle

DATA_VARIABLE = "COUNTERPART_DATA"
CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A developer's own settings and store stay out of the tests."""
    for name in os.environ:
        if name.startswith("COUNTERPART_") and name != DATA_VARIABLE:
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.getbasetemp() / "data-home"))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles with one in it: exact Gaussian models, as ONNX graphs."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def small_cubes() -> Iterator[None]:
    """Small volumes in the extractor: the phantom needs no 256 planes to be told apart from its bone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brain, "COARSE_SIDE", 48)
        patch.setattr(brain, "FINE_SIDE", 72)
        yield


@pytest.fixture(scope="session")
def real_scans() -> Path:
    """Folder of the real scans; without it, what needs them is skipped."""
    folder = Path(os.environ.get(DATA_VARIABLE, CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real scans: {DATA_VARIABLE} names no folder, and there is none beside the checkout")
    return folder
