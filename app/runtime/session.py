"""An ONNX graph as a callable on arrays, on exactly the provider that was asked for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.errors import DamagedBundle, OutOfMemory, ProviderUnavailable
from app.volume import FloatArray

if TYPE_CHECKING:
    import onnxruntime

Provider = Literal["cpu", "cuda"]

# onnxruntime has no class of its own for it. In order: its arena, C++, CUDA, cuDNN and cuBLAS.
ALLOCATION_FAILED = ("failed to allocate memory", "bad_alloc", "out of memory", "alloc_failed")

PROVIDERS: dict[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# TF32 would keep 10 bits of a product, too few for the golden pair; the heuristic takes the same algorithm at
# every start, where timing them takes another one now and then, and another rounding with it.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
# How training's export names the first axis of every input.
BATCH_AXIS = "n"


def open_session(
    path: Path, provider: Provider, threads: int = 0, *, batch: int = 0, graphs: bool = False
) -> "onnxruntime.InferenceSession":
    """Load a graph on one provider, and on no other.

    Parameters
    ----------
    path : Path
        The .onnx file.
    provider : {"cpu", "cuda"}
        Where to run.
    threads : int
        Of one operator; 0 takes every core that this process may use.
    batch : int
        The only batch size that it will run, so that all shapes are known; 0 leaves it open.
    graphs : bool
        Whether CUDA captures the work of an evaluation once and replays it: for a fixed batch, with inputs and
        outputs that stay where they are (`app.runtime.fixed`). The CPU has no such thing.

    Raises
    ------
    ProviderUnavailable
        onnxruntime is not installed, or would run elsewhere than asked: it lists CUDA where its
        libraries are missing and then quietly runs on the CPU. Or CUDA cannot capture this graph.
    DamagedBundle
        The file is not a graph that this onnxruntime reads.
    """
    ort = _onnxruntime()
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise _unavailable(provider, "this onnxruntime was built without it")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    # Threads that wait without spinning keep latency flat when scans share a machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # On a CPU, a plan of memory for each shape that comes by: a hundred megabytes, and nothing gained.
    options.enable_mem_pattern = provider == "cuda"
    options.log_severity_level = 3
    if batch:
        options.add_free_dimension_override_by_name(BATCH_AXIS, batch)
    at_device: dict[str, str] = {}
    if provider == "cuda":
        at_device = CUDA_OPTIONS | {"enable_cuda_graph": str(int(graphs))}
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
    try:
        session = ort.InferenceSession(str(path), options, providers=[wanted], provider_options=[at_device])
    except Exception as error:  # onnxruntime raises many unrelated classes
        if at_device and graphs:
            raise _unavailable(provider, f"{path.name} could not be loaded with CUDA graphs") from error
        raise DamagedBundle(
            f"{path.name} could not be loaded ({type(error).__name__}).",
            expected="an ONNX graph that this onnxruntime reads.",
            advice="Install the bundle again, or upgrade onnxruntime.",
        ) from error
    if session.get_providers()[0] != wanted:
        raise _unavailable(provider, f"the session fell back to {session.get_providers()[0]}")
    return session


def as_callable(session: "onnxruntime.InferenceSession", *, seldom: bool = False) -> Any:
    """The session's only output as a function of its inputs, in the graph's order.

    It raises `OutOfMemory` where onnxruntime could not allocate.

    Parameters
    ----------
    seldom : bool
        On a CPU, memory goes back after each call: for a network that is not asked again and again.
    """
    options = _onnxruntime().RunOptions()
    if seldom and "CUDAExecutionProvider" not in session.get_providers():
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    names = [i.name for i in session.get_inputs()]
    output = session.get_outputs()[0].name

    def run(*arrays: Any) -> FloatArray:
        with allocating():
            result: FloatArray = session.run([output], dict(zip(names, arrays, strict=True)), options)[0]
        return result

    return run


@contextmanager
def allocating() -> Iterator[None]:
    """Tell an allocation that failed in onnxruntime from its other faults.

    Raises
    ------
    OutOfMemory
        It could not allocate.
    """
    try:
        yield
    except Exception as error:
        if not any(sign in str(error).lower() for sign in ALLOCATION_FAILED):
            raise
        raise OutOfMemory(
            "onnxruntime could not allocate the memory of a network evaluation.",
            expected="memory for one batch.",
            advice="Give the worker more memory.",
        ) from None


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ProviderUnavailable(
            "onnxruntime is not installed.",
            expected="one of the extras `cpu` or `gpu`.",
            advice="pip install 'counterpart[cpu]' (or 'counterpart[gpu]'), never both: they share a folder.",
        ) from error
    return onnxruntime


def _unavailable(provider: str, why: str) -> ProviderUnavailable:
    return ProviderUnavailable(
        f"The provider `{provider}` was asked for and is not available: {why}.",
        expected="onnxruntime-gpu with its CUDA and cuDNN for `cuda`, any onnxruntime for `cpu`.",
        advice="Set COUNTERPART_PROVIDER=cpu, or install counterpart[gpu] in an environment without counterpart[cpu]; "
        "where CUDA graphs are at fault, COUNTERPART_GPU_BATCH=0 does without.",
    )
