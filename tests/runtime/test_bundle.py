"""A bundle serves only when it is what training wrote, where it was asked to run."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from threading import Barrier
from time import sleep

import numpy as np
import onnxruntime
import pytest

from app.errors import DamagedBundle, ProviderUnavailable
from app.pipeline.detect import detect
from app.pipeline.schedule import Schedule
from app.runtime.bundle import Bundle, find_bundles, load_bundle, read_manifest, shipped_models
from app.runtime.files import side_by_side
from app.runtime.session import open_session
from tests.support.oracle import gaussian_models
from tests.support.phantom import brain, with_lesion


@pytest.fixture(scope="module")
def bundle(tiny_models: Path) -> Bundle:
    return load_bundle(tiny_models / "tiny-0.0.1", threads=1)


@pytest.fixture
def copy(tiny_models: Path, tmp_path: Path) -> Path:
    """A bundle that a test may spoil."""
    return Path(shutil.copytree(tiny_models / "tiny-0.0.1", tmp_path / "tiny-0.0.1"))


def rewrite_manifest(folder: Path) -> None:
    """Give the manifest the hashes of the files that lie there now."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    for file in data["files"].values():
        file["sha256"] = hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest()
    path.write_text(json.dumps(data))


# ---- a sound bundle ----------------------------------------------------------------------------


def test_the_graphs_are_the_exact_models(bundle: Bundle) -> None:
    """The ONNX of the tests against numpy: an oracle that is itself checked."""
    s = bundle.manifest.schedule
    oracle = gaussian_models(Schedule.linear(s.steps, s.beta_start, s.beta_end))
    rng = np.random.default_rng(5)
    x = rng.random((3, 1, 64, 56), dtype=np.float32)
    z = rng.standard_normal((3, *bundle.manifest.latent_shape), dtype=np.float32)
    t = np.array([1, 500, 999])
    np.testing.assert_allclose(bundle.models.encode(x), oracle.encode(x), atol=2e-5)
    np.testing.assert_allclose(bundle.models.denoise(z, t), oracle.denoise(z, t), atol=2e-6)
    np.testing.assert_allclose(bundle.models.decode(z), oracle.decode(z), atol=2e-6)


def test_a_slice_is_told_the_same_in_any_batch(bundle: Bundle) -> None:
    rng = np.random.default_rng(6)
    z = rng.standard_normal((5, *bundle.manifest.latent_shape), dtype=np.float32)
    t = np.array([100, 200, 300, 400, 500])
    together = bundle.models.denoise(z, t)
    apart = np.concatenate([bundle.models.denoise(z[i : i + 1], t[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(together, apart, atol=1e-6)


def test_a_scan_is_told_the_same_in_any_batch(bundle: Bundle) -> None:
    scan = with_lesion(brain(), (25.0, 10.0, 20.0))
    expected = detect(scan, bundle.models, bundle.manifest)
    assert expected.latent_mask.any()
    for size in (1, 5):
        other = detect(scan, bundle.models.in_batches(size, lambda _: None), bundle.manifest)
        np.testing.assert_array_equal(other.latent_mask, expected.latent_mask)
        np.testing.assert_allclose(other.anomaly, expected.anomaly, atol=1e-5)


def test_a_bundle_knows_what_it_is(bundle: Bundle) -> None:
    assert bundle.manifest.id == "tiny-0.0.1"
    assert bundle.provider == "cpu"
    assert bundle.sha256 == hashlib.sha256((bundle.folder / "manifest.json").read_bytes()).hexdigest()


def test_bundles_are_found_by_their_manifest(copy: Path) -> None:
    (copy.parent / "notes").mkdir()
    (copy.parent / "README.md").write_text("no bundle")
    shutil.copytree(copy, copy.parent / "another-1.0.0")
    assert [p.name for p in find_bundles(copy.parent)] == ["another-1.0.0", "tiny-0.0.1"]
    assert find_bundles(copy.parent / "nowhere") == []


def test_the_shipped_models_are_beside_the_code() -> None:
    assert shipped_models().name in {"models", "_models"}


# ---- a damaged one -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder.onnx", "denoiser.onnx", "decoder.onnx", "golden.npz"])
def test_one_changed_byte_is_seen(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(DamagedBundle, match=f"{name} is not the file of the manifest"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["encoder.onnx", "denoiser.onnx", "decoder.onnx", "golden.npz"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(DamagedBundle, match=f"{name} is missing"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_text("{"), "1 invalid field"),
        (lambda path: path.write_text(path.read_text().replace('"seed"', '"sead"')), "invalid fields"),
    ],
    ids=["missing", "cut off", "another field"],
)
def test_a_manifest_that_cannot_be_obeyed_is_refused(copy: Path, spoil: object, told: str) -> None:
    assert callable(spoil)
    spoil(copy / "manifest.json")
    with pytest.raises(DamagedBundle, match=told):
        read_manifest(copy)


def test_a_file_that_is_no_graph_is_refused(copy: Path) -> None:
    (copy / "decoder.onnx").write_bytes(b"not a graph")
    rewrite_manifest(copy)
    with pytest.raises(DamagedBundle, match=r"decoder\.onnx could not be loaded"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["z0", "epsilon", "decoded"])
def test_a_graph_that_computes_something_else_is_refused(copy: Path, name: str) -> None:
    """Hashes agree, numbers do not: another provider or version of onnxruntime gone wrong."""
    with np.load(copy / "golden.npz") as golden:
        arrays = dict(golden)
    arrays[name] = arrays[name] + np.float32(0.01)
    np.savez(copy / "golden.npz", allow_pickle=False, **arrays)
    rewrite_manifest(copy)
    with pytest.raises(DamagedBundle, match="golden pair"):
        load_bundle(copy)


def test_a_graph_that_gives_nan_is_refused(copy: Path) -> None:
    with np.load(copy / "golden.npz") as golden:
        arrays = dict(golden)
    arrays["x"] = arrays["x"] * np.float32(np.nan)
    np.savez(copy / "golden.npz", allow_pickle=False, **arrays)
    rewrite_manifest(copy)
    with pytest.raises(DamagedBundle, match="golden pair"):
        load_bundle(copy)


# ---- side by side -------------------------------------------------------------------------------


def test_files_are_loadedside_by_side() -> None:
    """Both wait for each other: one after the other would never end."""
    meet = Barrier(2, timeout=10)
    assert sorted(side_by_side("cpu", [meet.wait, meet.wait])) == [0, 1]


def test_on_cuda_files_are_loaded_one_after_the_other() -> None:
    """No thread may allocate while another one captures a graph."""
    running: list[int] = []

    def task() -> int:
        running.append(1)
        sleep(0.01)
        return running.pop() + len(running)

    assert side_by_side("cuda", [task] * 4) == [1, 1, 1, 1]


def test_of_several_faults_the_first_file_is_named(copy: Path) -> None:
    for name in ("golden.npz", "decoder.onnx", "denoiser.onnx"):
        (copy / name).unlink()
    with pytest.raises(DamagedBundle, match=r"denoiser\.onnx is missing"):
        load_bundle(copy)


# ---- the provider ------------------------------------------------------------------------------


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime was built with CUDA"
)
def test_cuda_that_is_absent_is_refused(tiny_models: Path) -> None:
    with pytest.raises(ProviderUnavailable, match="`cuda` was asked for and is not available"):
        load_bundle(tiny_models / "tiny-0.0.1", "cuda")


def test_a_session_that_fell_back_is_refused(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with CUDA lists it even where its libraries are missing, and then runs on the CPU."""

    class FellBack:
        def __init__(self, *_: object, providers: Sequence[str], provider_options: Sequence[dict[str, str]]) -> None:
            assert list(providers) == ["CUDAExecutionProvider"]
            assert provider_options[0]["enable_cuda_graph"] == "0"

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FellBack)
    with pytest.raises(ProviderUnavailable, match="fell back to CPUExecutionProvider"):
        open_session(tiny_models / "tiny-0.0.1" / "encoder.onnx", "cuda")
