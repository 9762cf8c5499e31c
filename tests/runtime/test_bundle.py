"""Bundle: it is loaded only if it is complete, unchanged and runs on the requested provider."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
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
    """Return a copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(tiny_models / "tiny-0.0.1", tmp_path / "tiny-0.0.1"))


def rewrite_manifest(folder: Path) -> None:
    """Update the hashes in the manifest."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    for file in filter(None, data["files"].values()):
        file["sha256"] = hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest()
    path.write_text(json.dumps(data))


# ---- valid bundle ------------------------------------------------------------------------------


def test_graphs_equal_the_exact_networks(bundle: Bundle) -> None:
    oracle = gaussian_networks(Schedule.from_settings(bundle.manifest.schedule))
    rng = np.random.default_rng(5)
    x = rng.random((3, 1, 64, 56), dtype=np.float32)
    z = rng.standard_normal((3, *bundle.manifest.latent_shape), dtype=np.float32)
    t = np.array([1, 500, 999])
    np.testing.assert_allclose(bundle.networks.encode(x), oracle.encode(x), atol=2e-5)
    np.testing.assert_allclose(bundle.networks.denoise(z, t), oracle.denoise(z, t), atol=2e-6)
    np.testing.assert_allclose(bundle.networks.decode(z), oracle.decode(z), atol=2e-6)


def test_output_of_a_slice_does_not_depend_on_the_batch(bundle: Bundle) -> None:
    rng = np.random.default_rng(6)
    z = rng.standard_normal((5, *bundle.manifest.latent_shape), dtype=np.float32)
    t = np.array([100, 200, 300, 400, 500])
    together = bundle.networks.denoise(z, t)
    apart = np.concatenate([bundle.networks.denoise(z[i : i + 1], t[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(together, apart, atol=1e-6)


def test_detection_does_not_depend_on_the_batch(bundle: Bundle) -> None:
    scan = with_lesion(brain(), (25.0, 10.0, 20.0))
    expected = detect(scan, bundle.networks, bundle.manifest)
    assert expected.latent_mask.any()
    for size in (1, 5):
        other = detect(scan, bundle.networks.in_batches(size, lambda _: None), bundle.manifest)
        np.testing.assert_array_equal(other.latent_mask, expected.latent_mask)
        np.testing.assert_allclose(other.anomaly, expected.anomaly, atol=1e-5)


def test_bundle_has_its_identity(bundle: Bundle) -> None:
    assert bundle.manifest.id == "tiny-0.0.1"
    assert bundle.provider == "cpu"
    assert bundle.sha256 == hashlib.sha256((bundle.folder / "manifest.json").read_bytes()).hexdigest()


def test_folders_with_a_manifest_are_found(copy: Path) -> None:
    (copy.parent / "notes").mkdir()
    (copy.parent / "README.md").write_text("no bundle")
    shutil.copytree(copy, copy.parent / "another-1.0.0")
    assert [p.name for p in find_bundles(copy.parent)] == ["another-1.0.0", "tiny-0.0.1"]
    assert find_bundles(copy.parent / "nowhere") == []


def test_shipped_models_are_found() -> None:
    assert shipped_models().name in {"models", "_models"}


# ---- denoiser in int8 --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_int8(write_tiny_bundle(tmp_path_factory.mktemp("int8")))


def test_denoiser_in_int8_is_used_on_a_cpu(in_int8: Path, bundle: Bundle) -> None:
    loaded = load_bundle(in_int8, threads=1)
    assert (loaded.precision, bundle.precision, loaded.manifest.precision) == ("int8", "float32", "float32")
    z_t = np.random.default_rng(8).standard_normal((4, *loaded.manifest.latent_shape), dtype=np.float32)
    t = np.array([100, 200, 500, 900])
    found, exact = loaded.networks.denoise(z_t, t), bundle.networks.denoise(z_t, t)
    np.testing.assert_array_equal(found, np.round(found / INT8_STEP) * INT8_STEP)
    assert INT8_STEP / 4 < np.abs(found - exact).max() <= INT8_STEP / 2 + 1e-5
    np.testing.assert_array_equal(loaded.networks.encode(random_slices()), bundle.networks.encode(random_slices()))


def random_slices() -> FloatArray:
    return np.random.default_rng(9).random((2, 1, 64, 56), dtype=np.float32)


def test_float32_is_loaded_on_request(in_int8: Path, bundle: Bundle) -> None:
    loaded = load_bundle(in_int8, threads=1, quantised=False)
    assert loaded.precision == "float32"
    z_t = np.random.default_rng(8).standard_normal((2, *loaded.manifest.latent_shape), dtype=np.float32)
    t = np.array([100, 900])
    np.testing.assert_array_equal(loaded.networks.denoise(z_t, t), bundle.networks.denoise(z_t, t))


def test_int8_is_deterministic(in_int8: Path) -> None:
    scan = with_lesion(brain(), (25.0, 10.0, 20.0))
    again = [
        detect(scan, loaded.networks.in_batches(16, lambda _: None), loaded.manifest)
        for loaded in (load_bundle(in_int8, threads=1), load_bundle(in_int8, threads=1))
    ]
    assert again[0].latent_mask.any()
    for name in ("kl", "anomaly", "latent_mask"):
        assert getattr(again[0], name).tobytes() == getattr(again[1], name).tobytes(), name


@pytest.mark.parametrize("name", ["denoiser.onnx", INT8])
def test_hashes_of_both_denoisers_are_checked(in_int8: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(in_int8, tmp_path / "tiny-0.0.1"))
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    for quantised in (True, False):
        with pytest.raises(DamagedBundle, match=name):
            load_bundle(folder, quantised=quantised)


@pytest.mark.parametrize(("difference", "accepted"), [(0.9, True), (1.1, False)])
def test_int8_has_its_own_tolerance(in_int8: Path, tmp_path: Path, difference: float, *, accepted: bool) -> None:
    folder = Path(shutil.copytree(in_int8, tmp_path / "tiny-0.0.1"))
    with np.load(folder / "golden.npz") as golden:
        arrays = dict(golden)
    arrays["epsilon_int8"] = arrays["epsilon_int8"] + np.float32(difference * INT8_TOLERANCE)
    np.savez(folder / "golden.npz", allow_pickle=False, **arrays)
    rewrite_manifest(folder)
    load_bundle(folder, quantised=False)
    with nullcontext() if accepted else pytest.raises(DamagedBundle, match="golden pair"):
        load_bundle(folder)


def test_golden_pair_without_int8_is_refused(in_int8: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(in_int8, tmp_path / "tiny-0.0.1"))
    with np.load(folder / "golden.npz") as golden:
        arrays = {name: array for name, array in golden.items() if name != "epsilon_int8"}
    np.savez(folder / "golden.npz", allow_pickle=False, **arrays)
    rewrite_manifest(folder)
    with pytest.raises(DamagedBundle, match="epsilon_int8"):
        load_bundle(folder)


# ---- damaged bundle ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder.onnx", "denoiser.onnx", "decoder.onnx", "golden.npz"])
def test_changed_file_is_refused(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(DamagedBundle, match=name):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["encoder.onnx", "denoiser.onnx", "decoder.onnx", "golden.npz"])
def test_missing_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(DamagedBundle, match=name):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_text("{"), "1 invalid field"),
        (lambda path: path.write_text(path.read_text().replace('"seed"', '"sead"')), "invalid fields"),
        (lambda path: path.write_text(path.read_text().replace("coarse-patch", "unknown")), "method"),
    ],
    ids=["missing", "truncated", "unknown field", "unknown method"],
)
def test_invalid_manifest_is_refused(copy: Path, damage: Callable[[Path], object], reason: str) -> None:
    damage(copy / "manifest.json")
    with pytest.raises(DamagedBundle, match=reason):
        read_manifest(copy)


def test_file_that_is_no_graph_is_refused(copy: Path) -> None:
    (copy / "decoder.onnx").write_bytes(b"not a graph")
    rewrite_manifest(copy)
    with pytest.raises(DamagedBundle, match=r"decoder\.onnx"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["z0", "epsilon", "decoded"])
def test_output_that_differs_from_the_golden_pair_is_refused(copy: Path, name: str) -> None:
    """The hashes match, as with a faulty provider or version of onnxruntime."""
    with np.load(copy / "golden.npz") as golden:
        arrays = dict(golden)
    arrays[name] = arrays[name] + np.float32(0.01)
    np.savez(copy / "golden.npz", allow_pickle=False, **arrays)
    rewrite_manifest(copy)
    with pytest.raises(DamagedBundle, match="golden pair"):
        load_bundle(copy)


def test_graph_that_returns_nan_is_refused(copy: Path) -> None:
    with np.load(copy / "golden.npz") as golden:
        arrays = dict(golden)
    arrays["x"] = arrays["x"] * np.float32(np.nan)
    np.savez(copy / "golden.npz", allow_pickle=False, **arrays)
    rewrite_manifest(copy)
    with pytest.raises(DamagedBundle, match="golden pair"):
        load_bundle(copy)


# ---- concurrent loading ------------------------------------------------------------------------


def test_files_are_loaded_concurrently() -> None:
    """Each task waits for the other one."""
    barrier = Barrier(2, timeout=10)
    assert sorted(run_concurrently("cpu", [barrier.wait, barrier.wait])) == [0, 1]


def test_files_are_loaded_sequentially_on_cuda() -> None:
    """No thread may allocate memory while another one captures a graph."""
    running: list[int] = []

    def task() -> int:
        running.append(1)
        sleep(0.01)
        return running.pop() + len(running)

    assert run_concurrently("cuda", [task] * 4) == [1, 1, 1, 1]


def test_first_of_several_missing_files_is_named(copy: Path) -> None:
    for name in ("golden.npz", "decoder.onnx", "denoiser.onnx"):
        (copy / name).unlink()
    with pytest.raises(DamagedBundle, match=r"denoiser\.onnx"):
        load_bundle(copy)


# ---- provider ----------------------------------------------------------------------------------


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime was built with CUDA"
)
def test_missing_cuda_is_refused(tiny_models: Path) -> None:
    with pytest.raises(ProviderUnavailable, match="cuda"):
        load_bundle(tiny_models / "tiny-0.0.1", "cuda")


def test_session_that_fell_back_to_the_cpu_is_refused(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime lists CUDA even if its libraries are missing, and then runs on the CPU."""

    class FellBack:
        def __init__(self, *_: object, providers: Sequence[str], provider_options: Sequence[dict[str, str]]) -> None:
            assert list(providers) == ["CUDAExecutionProvider"]
            assert provider_options[0]["enable_cuda_graph"] == "0"

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FellBack)
    with pytest.raises(ProviderUnavailable, match="CPUExecutionProvider"):
        open_session(tiny_models / "tiny-0.0.1" / "encoder.onnx", "cuda")
