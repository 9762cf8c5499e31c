"""Brain extractor: it is loaded only if it is unchanged and gives the outputs of torch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from app.errors import DamagedBundle
from app.runtime.bundle import find_bundles, load_bundle, shipped_models
from app.runtime.extractor import CARD, EXTRACTOR, MANIFEST, load_extractor

SHIPPED = shipped_models() / EXTRACTOR


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / EXTRACTOR))


def test_shipped_extractor_agrees_with_torch() -> None:
    """The golden pair was computed by the TorchScript of deepbet. Only the sign of the log odds is used."""
    extractor = load_extractor(SHIPPED, threads=1)
    assert (extractor.manifest.method, extractor.manifest.version) == ("deepbet", "1.0.2")
    assert extractor.manifest.licence == "MIT"
    with np.load(SHIPPED / extractor.manifest.files.golden.name) as golden:
        for name, run in (("coarse", extractor.networks.coarse), ("fine", extractor.networks.fine)):
            assert np.mean((run(golden["x"]) > 0) == (golden[name] > 0)) > 0.9999, name
            assert golden[name].min() < -3
            assert golden[name].std() > 1


def test_extractor_has_a_licence_and_a_card() -> None:
    assert "Medical Machine Learning Lab" in (SHIPPED / "LICENSE").read_text()
    card = (SHIPPED / CARD).read_text()
    assert "10.1016/j.compbiomed.2024.108845" in card


def test_extractor_is_not_a_bundle() -> None:
    assert SHIPPED not in find_bundles(shipped_models())


@pytest.mark.parametrize("name", ["coarse.onnx", "fine.onnx", "golden.npz"])
def test_changed_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedBundle, match=name):
        load_extractor(copy)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedBundle, match=MANIFEST):
        load_extractor(tmp_path / "none")


def test_swapped_networks_are_refused(copy: Path) -> None:
    path = copy / MANIFEST
    data = json.loads(path.read_text())
    data["files"]["coarse"], data["files"]["fine"] = data["files"]["fine"], data["files"]["coarse"]
    path.write_text(json.dumps(data))
    with pytest.raises(DamagedBundle, match="golden pair"):
        load_extractor(copy, threads=1)


def test_extractor_is_loaded_for_models_of_brains_only(tiny_models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_models / "tiny-0.0.1", tmp_path / "tiny-0.0.1"))
    assert load_bundle(folder, threads=1).extractor is None
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data["preprocessing"]["brain_only"] = True
    path.write_text(json.dumps(data))
    extractor = load_bundle(folder, threads=1).extractor
    assert extractor is not None
    assert extractor.sha256 == load_extractor(SHIPPED, threads=1).sha256
