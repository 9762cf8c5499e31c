"""The brain extractor serves only when it is what was shipped, and gives the numbers that torch gave."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from app.errors import DamagedBundle
from app.manifest import Preprocessing
from app.runtime.bundle import find_bundles, load_bundle, shipped_models
from app.runtime.extractor import CARD, EXTRACTOR, MANIFEST, load_extractor
from tests.support.bundle import tiny_manifest

SHIPPED = shipped_models() / EXTRACTOR


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / EXTRACTOR))


def test_the_shipped_one_gives_what_torch_gave() -> None:
    """The golden pair was computed by deepbet's own TorchScript; only the sign of the log odds is used."""
    extractor = load_extractor(SHIPPED, threads=1)
    assert (extractor.manifest.method, extractor.manifest.version) == ("deepbet", "1.0.2")
    assert extractor.manifest.licence == "MIT"
    with np.load(SHIPPED / extractor.manifest.files.golden.name) as golden:
        for name, run in (("coarse", extractor.networks.coarse), ("fine", extractor.networks.fine)):
            assert np.mean((run(golden["x"]) > 0) == (golden[name] > 0)) > 0.9999, name
            assert golden[name].min() < -3
            assert golden[name].std() > 1


def test_it_brings_its_licence_and_its_card() -> None:
    assert "Medical Machine Learning Lab" in (SHIPPED / "LICENSE").read_text()
    card = (SHIPPED / CARD).read_text()
    assert "10.1016/j.compbiomed.2024.108845" in card


def test_it_is_no_model_to_choose() -> None:
    assert SHIPPED not in find_bundles(shipped_models())


@pytest.mark.parametrize("name", ["coarse.onnx", "fine.onnx", "golden.npz"])
def test_a_changed_file_is_damage(copy: Path, name: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedBundle, match=name):
        load_extractor(copy)


def test_a_missing_folder_is_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedBundle, match=MANIFEST):
        load_extractor(tmp_path / "none")


def test_swapped_networks_do_not_give_the_golden_pair(copy: Path) -> None:
    path = copy / MANIFEST
    data = json.loads(path.read_text())
    data["files"]["coarse"], data["files"]["fine"] = data["files"]["fine"], data["files"]["coarse"]
    path.write_text(json.dumps(data))
    with pytest.raises(DamagedBundle, match="golden pair of its coarse network"):
        load_extractor(copy, threads=1)


def test_a_bundle_of_brains_alone_brings_it(tiny_models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_models / "tiny-0.0.1", tmp_path / "tiny-0.0.1"))
    assert load_bundle(folder, threads=1).extractor is None
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data["preparation"]["brain_only"] = True
    path.write_text(json.dumps(data))
    extractor = load_bundle(folder, threads=1).extractor
    assert extractor is not None
    assert extractor.sha256 == load_extractor(SHIPPED, threads=1).sha256


def test_a_manifest_that_does_not_say_so_is_of_scans_as_they_come() -> None:
    fields = tiny_manifest().preparation.model_dump(exclude={"brain_only"})
    assert Preprocessing.model_validate(fields).brain_only is False
