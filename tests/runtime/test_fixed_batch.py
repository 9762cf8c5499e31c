"""Fixed batches: the same outputs as without them, and the options of CUDA sessions."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from app.errors import OutOfMemory, ProviderUnavailable
from app.pipeline.diffusion import Networks
from app.runtime import bundle as bundle_module
from app.runtime.bundle import load_bundle
from app.runtime.fixed_batch import FixedBatch
from app.runtime.session import as_callable, open_session
from app.volume import FloatArray

Inputs = tuple[FloatArray, np.ndarray[Any, np.dtype[np.int64]]]


@pytest.fixture(scope="module")
def path(tiny_models: Path) -> Path:
    return tiny_models / "tiny-0.0.1" / "denoiser.onnx"


def opener(path: Path) -> Callable[[int], onnxruntime.InferenceSession]:
    return lambda size: open_session(path, "cpu", 1, batch=size)


def random_inputs(path: Path, count: int) -> Inputs:
    shape = open_session(path, "cpu", 1).get_inputs()[0].shape[1:]
    rng = np.random.default_rng(count)
    return rng.standard_normal((count, *shape), dtype=np.float32), rng.integers(1, 999, count)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_output_does_not_depend_on_the_fixed_size(path: Path, count: int) -> None:
    z, t = random_inputs(path, count)
    expected = as_callable(open_session(path, "cpu", 1))(z, t)
    found = FixedBatch(opener(path), 4, "cpu")(z, t)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_session_accepts_only_its_batch_size(path: Path) -> None:
    session = open_session(path, "cpu", 1, batch=4)
    assert [i.shape[0] for i in (*session.get_inputs(), *session.get_outputs())] == [4, 4, 4]
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        as_callable(session)(*random_inputs(path, 3))


def test_buffers_keep_their_addresses(path: Path) -> None:
    """Otherwise a captured graph would read old inputs."""
    addresses: list[list[int]] = []

    class Watched(FixedBatch):
        def __call__(self, *arrays: Any) -> FloatArray:
            result = super().__call__(*arrays)
            assert self._bound is not None
            addresses.append([value.data_ptr() for value in (*self._bound._inputs, self._bound._output)])
            return result

    network = Watched(opener(path), 4, "cpu")
    first_inputs, second_inputs = random_inputs(path, 4), random_inputs(path, 2)
    first = network(*first_inputs)
    kept = first.copy()
    second = network(*second_inputs)
    assert addresses[0] == addresses[1]
    assert len(set(addresses[0])) == 3
    np.testing.assert_array_equal(first, kept)  # the output is a copy
    np.testing.assert_array_equal(second, as_callable(open_session(path, "cpu", 1))(*second_inputs))


def test_arrays_in_fortran_order_are_accepted(path: Path) -> None:
    z, t = random_inputs(path, 4)
    fortran = np.ascontiguousarray(z.T).T
    assert not fortran.flags.c_contiguous
    network = FixedBatch(opener(path), 4, "cpu")
    np.testing.assert_array_equal(network(fortran, t), network(z, t))


def test_fixed_batch_is_halved_if_memory_runs_out(path: Path) -> None:
    """`Networks.in_batches` halves its batch and repeats the call, which must then allocate less."""
    opened: list[int] = []

    def open_at(size: int) -> onnxruntime.InferenceSession:
        opened.append(size)
        if size > 2:
            raise RuntimeError("CUDA failure 2: out of memory")
        return open_session(path, "cpu", 1, batch=size)

    network = FixedBatch(open_at, 4, "cpu")
    run: Any = network
    z, t = random_inputs(path, 7)
    reported: list[int] = []
    models = Networks(run, run, run).in_batches(4, reported.append)
    np.testing.assert_array_equal(models.denoise(z, t), as_callable(open_session(path, "cpu", 1))(z, t))
    assert (opened, reported, network.size) == ([4, 2], [2, 2, 2, 1], 2)


def test_other_errors_pass(path: Path) -> None:
    z, t = random_inputs(path, 4)
    network = FixedBatch(opener(path), 4, "cpu")
    with pytest.raises(Exception, match="size") as caught:
        network(z[:, :1], t)
    assert not isinstance(caught.value, OutOfMemory)
    assert network.size == 4


# ---- options of CUDA sessions ------------------------------------------------------------------


class OpenedWith(Exception):
    """Options that a session was opened with."""


def refuse(*_: object, providers: Sequence[str], provider_options: Sequence[dict[str, str]]) -> None:
    raise OpenedWith(*providers, *provider_options)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_cuda_is_the_only_provider_and_tf32_is_off(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, cuda_graphs: bool
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(Exception, match="could not be loaded") as caught:
        open_session(path, "cuda", batch=4, cuda_graphs=cuda_graphs)
    assert isinstance(caught.value, ProviderUnavailable) == cuda_graphs
    assert isinstance(caught.value.__cause__, OpenedWith)
    provider, options = caught.value.__cause__.args
    assert provider == "CUDAExecutionProvider"
    wanted = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": str(int(cuda_graphs))}
    assert options == wanted


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime was built with CUDA"
)
@pytest.mark.parametrize("gpu_batch", [0, 8])
def test_missing_cuda_is_refused_with_and_without_graphs(path: Path, gpu_batch: int) -> None:
    with pytest.raises(ProviderUnavailable, match="cuda"):
        load_bundle(path.parent, "cuda", gpu_batch=gpu_batch)


def test_bundle_on_cuda_runs_in_fixed_batches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions and buffers are on the CPU, everything else is as on CUDA."""
    opened: list[tuple[str, str, int, bool]] = []

    def on_the_cpu(
        file: Path, provider: str, threads: int, *, batch: int = 0, cuda_graphs: bool = False
    ) -> onnxruntime.InferenceSession:
        opened.append((file.name, provider, batch, cuda_graphs))
        return open_session(file, "cpu", threads, batch=batch)

    monkeypatch.setattr(bundle_module, "open_session", on_the_cpu)
    monkeypatch.setattr(bundle_module, "FixedBatch", partial(FixedBatch, device="cpu"))
    loaded = load_bundle(path.parent, "cuda", 1, gpu_batch=8)
    assert opened == [(f"{name}.onnx", "cuda", 8, True) for name in ("encoder", "denoiser", "decoder")]
    assert (loaded.provider, loaded.batch) == ("cuda", 8)
    monkeypatch.undo()
    plain = load_bundle(path.parent, threads=1)
    assert plain.batch == 16
    z, t = random_inputs(path, 11)
    np.testing.assert_array_equal(loaded.networks.denoise(z, t), plain.networks.denoise(z, t))
