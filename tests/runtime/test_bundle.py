"""A bundle serves only when it is what training wrote, where it was asked to run."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier
from time import sleep

import numpy as np
import onnxruntime
import pytest

from app.errors import DamagedBundle, ProviderUnavailable
from app.pipeline.detect import detect
from app.pipeline.diffusion import Schedule
from app.runtime.bundle import INT8_TOLERANCE, Bundle, find_bundles, load_bundle, read_manifest, shipped_models
from app.runtime.session import open_session, run_concurrently
from app.volume import FloatArray
from tests.support.bundle import INT8, INT8_STEP, add_int8, write_tiny_bundle
from tests.support.oracle import gaussian_networks
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
    for file in filter(None, data["files"].values()):
        file["sha256"] = hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest()
    path.write_text(json.dumps(data))


# ---- a sound bundle ----------------------------------------------------------------------------


def test_the_graphs_are_the_exact_models(bundle: Bundle) -> None:
    """The ONNX of the tests against numpy: an oracle that is itself checked."""
    s = bundle.manifest.schedule
    oracle = gaussian_networks(Schedule.linear(s.steps, s.beta_start, s.beta_end))
    rng = np.random.default_rng(5)
    x = rng.random((3, 1, 64, 56), dtype=np.float32)
    z = rng.standard_normal((3, *bundle.manifest.latent_shape), dtype=np.float32)
    t = np.array([1, 500, 999])
    np.testing.assert_allclose(bundle.networks.encode(x), oracle.encode(x), atol=2e-5)
    np.testing.assert_allclose(bundle.networks.denoise(z, t), oracle.denoise(z, t), atol=2e-6)
    np.testing.assert_allclose(bundle.networks.decode(z), oracle.decode(z), atol=2e-6)


def test_a_slice_is_told_the_same_in_any_batch(bundle: Bundle) -> None:
    rng = np.random.default_rng(6)
    z = rng.standard_normal((5, *bundle.manifest.latent_shape), dtype=np.float32)
    t = np.array([100, 200, 300, 400, 500])
    together = bundle.networks.denoise(z, t)
    apart = np.concatenate([bundle.networks.denoise(z[i : i + 1], t[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(together, apart, atol=1e-6)


def test_a_scan_is_told_the_same_in_any_batch(bundle: Bundle) -> None:
    scan = with_lesion(brain(), (25.0, 10.0, 20.0))
    expected = detect(scan, bundle.networks, bundle.manifest)
    assert expected.latent_mask.any()
    for size in (1, 5):
        other = detect(scan, bundle.networks.in_batches(size, lambda _: None), bundle.manifest)
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


# ---- in int8 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_int8(write_tiny_bundle(tmp_path_factory.mktemp("int8")))


def test_on_a_cpu_the_denoiser_in_int8_is_served(in_int8: Path, bundle: Bundle) -> None:
    loaded = load_bundle(in_int8, threads=1)
    assert (loaded.precision, bundle.precision, loaded.manifest.precision) == ("int8", "float32", "float32")
    z_t = np.random.default_rng(8).standard_normal((4, *loaded.manifest.latent_shape), dtype=np.float32)
    t = np.array([100, 200, 500, 900])
    found, exact = loaded.networks.denoise(z_t, t), bundle.networks.denoise(z_t, t)
    np.testing.assert_array_equal(found, np.round(found / INT8_STEP) * INT8_STEP)
    assert INT8_STEP / 4 < np.abs(found - exact).max() <= INT8_STEP / 2 + 1e-5
    np.testing.assert_array_equal(loaded.networks.encode(z_image()), bundle.networks.encode(z_image()))


def z_image() -> FloatArray:
    return np.random.default_rng(9).random((2, 1, 64, 56), dtype=np.float32)


def test_float32_is_loaded_where_it_is_asked_for(in_int8: Path, bundle: Bundle) -> None:
    loaded = load_bundle(in_int8, threads=1, quantised=False)
    assert loaded.precision == "float32"
    z_t = np.random.default_rng(8).standard_normal((2, *loaded.manifest.latent_shape), dtype=np.float32)
    t = np.array([100, 900])
    np.testing.assert_array_equal(loaded.networks.denoise(z_t, t), bundle.networks.denoise(z_t, t))


def test_int8_gives_the_same_bytes_again(in_int8: Path) -> None:
    scan = with_lesion(brain(), (25.0, 10.0, 20.0))
    again = [
        detect(scan, loaded.networks.in_batches(16, lambda _: None), loaded.manifest)
        for loaded in (load_bundle(in_int8, threads=1), load_bundle(in_int8, threads=1))
    ]
    assert again[0].latent_mask.any()
    for name in ("kl", "anomaly", "latent_mask"):
        assert getattr(again[0], name).tobytes() == getattr(again[1], name).tobytes(), name


@pytest.mark.parametrize("name", ["denoiser.onnx", INT8])
def test_both_denoisers_must_be_those_of_the_manifest(in_int8: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(in_int8, tmp_path / "tiny-0.0.1"))
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    for quantised in (True, False):
        with pytest.raises(DamagedBundle, match=f"{name} is not the file of the manifest"):
            load_bundle(folder, quantised=quantised)


@pytest.mark.parametrize(("off", "fits"), [(0.9, True), (1.1, False)])
def test_int8_has_a_tolerance_of_its_own(in_int8: Path, tmp_path: Path, off: float, fits: bool) -> None:  # noqa: FBT001
    folder = Path(shutil.copytree(in_int8, tmp_path / "tiny-0.0.1"))
    with np.load(folder / "golden.npz") as golden:
        arrays = dict(golden)
    arrays["epsilon_int8"] = arrays["epsilon_int8"] + np.float32(off * INT8_TOLERANCE)
    np.savez(folder / "golden.npz", allow_pickle=False, **arrays)
    rewrite_manifest(folder)
    load_bundle(folder, quantised=False)
    with nullcontext() if fits else pytest.raises(DamagedBundle, match=r"comes out .* and 0\.\d+ off"):
        load_bundle(folder)


def test_a_golden_pair_without_int8_is_refused(in_int8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(in_int8, tmp_path / "tiny-0.0.1"))
    with np.load(folder / "golden.npz") as golden:
        arrays = {name: array for name, array in golden.items() if name != "epsilon_int8"}
    np.savez(folder / "golden.npz", allow_pickle=False, **arrays)
    rewrite_manifest(folder)
    with pytest.raises(DamagedBundle, match="has no `epsilon_int8`"):
        load_bundle(folder)


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
    assert sorted(run_concurrently("cpu", [meet.wait, meet.wait])) == [0, 1]


def test_on_cuda_files_are_loaded_one_after_the_other() -> None:
    """No thread may allocate while another one captures a graph."""
    running: list[int] = []

    def task() -> int:
        running.append(1)
        sleep(0.01)
        return running.pop() + len(running)

    assert run_concurrently("cuda", [task] * 4) == [1, 1, 1, 1]


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
