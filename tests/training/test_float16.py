"""Tests of a bundle whose denoiser computes in float16."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from app.errors import DamagedBundle
from app.manifest import File
from app.runtime import bundle as runtime
from app.runtime.bundle import load_bundle, read_manifest, shipped_models
from training.float16 import convert

pytestmark = pytest.mark.training

HEADCT = next(shipped_models().glob("headct-[0-9]*"))  # a bundle without brain extraction, which loads faster


def test_only_the_denoiser_computes_in_float16(tmp_path: Path) -> None:
    folder = convert(HEADCT, tmp_path)
    manifest, before = read_manifest(folder), read_manifest(HEADCT)
    assert (folder.name, manifest.id, manifest.precision) == (f"headct-f16-{before.version}", folder.name, "float16")
    assert manifest.files.encoder == before.files.encoder
    assert manifest.kl == before.kl
    sizes = [(path / "denoiser.onnx").stat().st_size for path in (folder, HEADCT)]
    assert sizes[0] < 0.51 * sizes[1]
    graph = onnx.load(folder / "denoiser.onnx").graph
    float32 = onnx.TensorProto.FLOAT
    assert {v.type.tensor_type.elem_type for v in (graph.input[0], graph.output[0])} == {float32}
    converted, plain = load_bundle(folder, threads=1).networks, load_bundle(HEADCT, threads=1, quantised=False).networks
    with np.load(folder / "golden.npz") as golden:
        off = np.abs(converted.denoise(golden["z_t"], golden["t"]) - plain.denoise(golden["z_t"], golden["t"])).max()
        np.testing.assert_array_equal(converted.encode(golden["x"]), plain.encode(golden["x"]))
    assert 1e-5 < off < 5e-3  # float16, and close


def test_denoiser_in_int8_is_removed(tmp_path: Path) -> None:
    bundle = tmp_path / HEADCT.name
    shutil.copytree(HEADCT, bundle)
    (bundle / "denoiser.int8.onnx").write_bytes(b"int8")
    plain = read_manifest(HEADCT)
    other = File(name="denoiser.int8.onnx", sha256=hashlib.sha256(b"int8").hexdigest())
    both = plain.model_copy(update={"files": plain.files.model_copy(update={"denoiser_int8": other})})
    (bundle / "manifest.json").write_text(both.model_dump_json())
    folder = convert(bundle, tmp_path / "f16")
    assert read_manifest(folder).files.denoiser_int8 is None
    assert not (folder / "denoiser.int8.onnx").exists()
    assert load_bundle(folder, threads=1).precision == "float16"


def test_bundle_with_a_wrong_golden_pair_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "FLOAT16_TOLERANCE", 1e-6)
    with pytest.raises(DamagedBundle, match="headct-f16"):
        convert(HEADCT, tmp_path)
    assert list(tmp_path.iterdir()) == []
