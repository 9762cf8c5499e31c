"""ONNX graphs as callables on arrays, on exactly the provider that was requested."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.errors import DamagedBundle, OutOfMemory, ProviderUnavailable
from app.manifest import File
from app.volume import FloatArray

if TYPE_CHECKING:
    import onnxruntime

Provider = Literal["cpu", "cuda"]

# onnxruntime has no exception class for a failed allocation. These are the messages of its arena, of C++, of CUDA, and
# of cuDNN and cuBLAS.
ALLOCATION_FAILED = ("failed to allocate memory", "bad_alloc", "out of memory", "alloc_failed")

PROVIDERS: dict[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# TF32 keeps 10 bits of a product, too few for the golden pair. The heuristic selects the same algorithm at every start.
# Timing the algorithms may select another one, with another rounding.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
# Name of the first axis of every input, as the export of training writes it.
BATCH_AXIS = "n"


def open_session(
    path: Path, provider: Provider, threads: int = 0, *, batch: int = 0, cuda_graphs: bool = False
) -> "onnxruntime.InferenceSession":
    """Open a graph on one provider, without falling back to another.

    Parameters
    ----------
    path : Path
        The .onnx file.
    provider : {"cpu", "cuda"}
    threads : int
        Number of threads of one operator. 0 takes every core that this process may use.
    batch : int
        The only batch size that the session will run, so that all shapes are known. 0 leaves it open.
    cuda_graphs : bool
        Let CUDA capture an evaluation once and replay it. It needs a fixed batch size and inputs and outputs at fixed
        addresses (`app.runtime.fixed_batch`). It has no effect on a CPU.

    Raises
    ------
    ProviderUnavailable
        onnxruntime is not installed, the session would run on another provider, or CUDA cannot capture the graph.
        onnxruntime lists CUDA even if its libraries are missing, and then runs on the CPU without an error.
    DamagedBundle
        The file is not a graph that this onnxruntime can read.
    """
    ort = _onnxruntime()
    wanted = PROVIDERS[provider]
    check_provider(provider)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    # If waiting threads do not spin, the latency stays constant when several scans share a machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # On a CPU, one memory plan for each input shape takes a hundred megabytes and saves no time.
    options.enable_mem_pattern = provider == "cuda"
    options.log_severity_level = 3
    if batch:
        options.add_free_dimension_override_by_name(BATCH_AXIS, batch)
    provider_options: dict[str, str] = {}
    if provider == "cuda":
        provider_options = CUDA_OPTIONS | {"enable_cuda_graph": str(int(cuda_graphs))}
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
    try:
        session = ort.InferenceSession(str(path), options, providers=[wanted], provider_options=[provider_options])
    except Exception as error:  # onnxruntime raises many unrelated classes
        if provider_options and cuda_graphs:
            raise _unavailable(provider, f"{path.name} could not be loaded with CUDA graphs") from error
        raise DamagedBundle(
            f"{path.name} could not be loaded ({type(error).__name__}).",
            expected="an ONNX graph that this onnxruntime can read.",
            advice="Install the bundle again, or upgrade onnxruntime.",
        ) from error
    if session.get_providers()[0] != wanted:
        raise _unavailable(provider, f"the session fell back to {session.get_providers()[0]}")
    return session


def as_callable(session: "onnxruntime.InferenceSession", *, shrink_arena: bool = False) -> Any:
    """Return a function from the inputs of a session, in the order of the graph, to its only output.

    The function raises `OutOfMemory` if onnxruntime cannot allocate memory.

    Parameters
    ----------
    session : onnxruntime.InferenceSession
    shrink_arena : bool
        On a CPU, return the memory to the system after each call. Use it for a network with few calls.
    """
    options = _onnxruntime().RunOptions()
    if shrink_arena and "CUDAExecutionProvider" not in session.get_providers():
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    names = [i.name for i in session.get_inputs()]
    output = session.get_outputs()[0].name

    def run(*arrays: Any) -> FloatArray:
        with raise_out_of_memory():
            result: FloatArray = session.run([output], dict(zip(names, arrays, strict=True)), options)[0]
        return result

    return run


@contextmanager
def raise_out_of_memory() -> Iterator[None]:
    """Turn a failed allocation of onnxruntime into `OutOfMemory`. Other exceptions pass.

    Raises
    ------
    OutOfMemory
        onnxruntime could not allocate memory.
    """
    try:
        yield
    except Exception as error:
        if not any(sign in str(error).lower() for sign in ALLOCATION_FAILED):
            raise
        raise OutOfMemory(
            "onnxruntime could not allocate the memory for a network evaluation.",
            expected="enough memory for one batch.",
            advice="Give the worker more memory.",
        ) from None


def check_sha256(folder: Path, file: File, advice: str) -> None:
    """Check that a file exists and is unchanged.

    Raises
    ------
    DamagedBundle
        The file is missing, or its SHA-256 differs from the manifest.
    """
    path = folder / file.name
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    if found != file.sha256:
        raise DamagedBundle(
            f"{folder.name}/{file.name} " + ("is missing." if found is None else "is not the file of the manifest."),
            expected=f"a file with the SHA-256 {file.sha256[:12]}...",
            advice=advice,
        )


def run_concurrently(provider: Provider, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run tasks in threads and return their results in order. If tasks fail, raise the error of the first of them.

    Hashing, opening and evaluating release the interpreter lock. On CUDA the tasks run one after the other, because no
    thread may allocate memory while another one captures a CUDA graph.
    """
    with ThreadPoolExecutor(1 if provider == "cuda" else len(tasks)) as pool:
        return [done.result() for done in [pool.submit(task) for task in tasks]]


def check_provider(provider: Provider) -> None:
    """Check that onnxruntime is installed and was built with a provider. The CPU is checked without an import.

    Raises
    ------
    ProviderUnavailable
    """
    if provider == "cpu" and find_spec("onnxruntime") is not None:
        return
    if PROVIDERS[provider] not in _onnxruntime().get_available_providers():
        raise _unavailable(provider, "this onnxruntime was built without it")


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ProviderUnavailable(
            "onnxruntime is not installed.",
            expected="one of the extras `cpu` or `gpu`.",
            advice="Run pip install 'counterpart[cpu]' or 'counterpart[gpu]'. Never install both: they share a folder.",
        ) from error
    return onnxruntime


def _unavailable(provider: str, why: str) -> ProviderUnavailable:
    return ProviderUnavailable(
        f"The provider `{provider}` was requested and is not available: {why}.",
        expected="onnxruntime-gpu with its CUDA and cuDNN for `cuda`, any onnxruntime for `cpu`.",
        advice="Set COUNTERPART_PROVIDER=cpu, or install counterpart[gpu] in an environment without counterpart[cpu]. "
        "If CUDA graphs are the cause, set COUNTERPART_GPU_BATCH=0.",
    )
