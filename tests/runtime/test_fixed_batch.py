"""Batches of a fixed size at a fixed place: the same answers as without, on the CPU; and what CUDA is asked for."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from app.errors import OutOfMemory, ProviderUnavailable
from app.pipeline.networks import Networks
from app.runtime import bundle as runtime
from app.runtime.bundle import load_bundle
from app.runtime.fixed_batch import FixedBatch
from app.runtime.session import as_callable, open_session
from app.volume import FloatArray

Inputs = tuple[FloatArray, np.ndarray[Any, np.dtype[np.int64]]]


@pytest.fixture(scope="module")
def path(tiny_models: Path) -> Path:
    return tiny_models / "tiny-0.0.1" / "denoiser.onnx"


def at(path: Path) -> Callable[[int], onnxruntime.InferenceSession]:
    return lambda size: open_session(path, "cpu", 1, batch=size)


def some(path: Path, count: int) -> Inputs:
    shape = open_session(path, "cpu", 1).get_inputs()[0].shape[1:]
    rng = np.random.default_rng(count)
    return rng.standard_normal((count, *shape), dtype=np.float32), rng.integers(1, 999, count)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_any_number_of_slices_is_told_the_same_to_the_byte(path: Path, count: int) -> None:
    z, t = some(path, count)
    expected = as_callable(open_session(path, "cpu", 1))(z, t)
    found = FixedBatch(at(path), 4, "cpu")(z, t)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_the_session_runs_its_batch_alone(path: Path) -> None:
    session = open_session(path, "cpu", 1, batch=4)
    assert [i.shape[0] for i in (*session.get_inputs(), *session.get_outputs())] == [4, 4, 4]
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        as_callable(session)(*some(path, 3))


def test_inputs_and_outputs_stay_where_they_are(path: Path) -> None:
    """Else a captured graph would read old inputs."""
    places: list[list[int]] = []

    class Watched(FixedBatch):
        def __call__(self, *arrays: Any) -> FloatArray:
            result = super().__call__(*arrays)
            assert self._bound is not None
            places.append([value.data_ptr() for value in (*self._bound._inputs, self._bound._output)])
            return result

    network = Watched(at(path), 4, "cpu")
    first_inputs, second_inputs = some(path, 4), some(path, 2)
    first = network(*first_inputs)
    kept = first.copy()
    second = network(*second_inputs)
    assert places[0] == places[1]
    assert len(set(places[0])) == 3
    np.testing.assert_array_equal(first, kept)  # an answer is the caller's own
    np.testing.assert_array_equal(second, as_callable(open_session(path, "cpu", 1))(*second_inputs))


def test_arrays_in_another_order_in_memory_are_taken(path: Path) -> None:
    z, t = some(path, 4)
    turned = np.ascontiguousarray(z.T).T
    assert not turned.flags.c_contiguous
    network = FixedBatch(at(path), 4, "cpu")
    np.testing.assert_array_equal(network(turned, t), network(z, t))


def test_memory_that_runs_out_halves_the_fixed_batch_too(path: Path) -> None:
    """`Models.in_batches` halves once and comes again: then there must be less to allocate."""
    opened: list[int] = []

    def open_at(size: int) -> onnxruntime.InferenceSession:
        opened.append(size)
        if size > 2:
            raise RuntimeError("CUDA failure 2: out of memory")
        return open_session(path, "cpu", 1, batch=size)

    network = FixedBatch(open_at, 4, "cpu")
    run: Any = network
    z, t = some(path, 7)
    ticks: list[int] = []
    models = Networks(run, run, run).in_batches(4, ticks.append)
    np.testing.assert_array_equal(models.denoise(z, t), as_callable(open_session(path, "cpu", 1))(z, t))
    assert (opened, ticks, network.size) == ([4, 2], [2, 2, 2, 1], 2)


def test_another_fault_stays_what_it_is(path: Path) -> None:
    z, t = some(path, 4)
    network = FixedBatch(at(path), 4, "cpu")
    with pytest.raises(Exception, match="size") as caught:
        network(z[:, :1], t)
    assert not isinstance(caught.value, OutOfMemory)
    assert network.size == 4


# ---- what CUDA is asked for --------------------------------------------------------------------


class Asked(Exception):
    """What a session was opened with."""


def refuse(*_: object, providers: Sequence[str], provider_options: Sequence[dict[str, str]]) -> None:
    raise Asked(*providers, *provider_options)


@pytest.mark.parametrize("graphs", [True, False])
def test_cuda_is_asked_for_alone_and_for_full_float32(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, graphs: bool
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(Exception, match="could not be loaded") as caught:
        open_session(path, "cuda", batch=4, cuda_graphs=graphs)
    assert isinstance(caught.value, ProviderUnavailable) == graphs  # else the file would be at fault
    assert isinstance(caught.value.__cause__, Asked)
    provider, options = caught.value.__cause__.args
    assert provider == "CUDAExecutionProvider"
    wanted = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": str(int(graphs))}
    assert options == wanted


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime was built with CUDA"
)
@pytest.mark.parametrize("gpu_batch", [0, 8])
def test_cuda_that_is_absent_is_refused_with_and_without_graphs(path: Path, gpu_batch: int) -> None:
    with pytest.raises(ProviderUnavailable, match="built without it"):
        load_bundle(path.parent, "cuda", gpu_batch=gpu_batch)


def test_a_bundle_on_cuda_runs_in_fixed_batches_and_its_golden_pair_comes_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the device: sessions and places of the CPU in CUDA's stead."""
    asked: list[tuple[str, str, int, bool]] = []

    def on_the_cpu(
        file: Path, provider: str, threads: int, *, batch: int = 0, graphs: bool = False
    ) -> onnxruntime.InferenceSession:
        asked.append((file.name, provider, batch, graphs))
        return open_session(file, "cpu", threads, batch=batch)

    monkeypatch.setattr(runtime, "open_session", on_the_cpu)
    monkeypatch.setattr(runtime, "FixedBatch", partial(FixedBatch, device="cpu"))
    loaded = load_bundle(path.parent, "cuda", 1, gpu_batch=8)
    assert asked == [(f"{name}.onnx", "cuda", 8, True) for name in ("encoder", "denoiser", "decoder")]
    assert (loaded.provider, loaded.batch) == ("cuda", 8)
    monkeypatch.undo()
    plain = load_bundle(path.parent, threads=1)
    assert plain.batch == 16
    z, t = some(path, 11)
    np.testing.assert_array_equal(loaded.networks.denoise(z, t), plain.networks.denoise(z, t))
