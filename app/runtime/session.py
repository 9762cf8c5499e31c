"""An ONNX graph as a callable on arrays, on exactly the provider that was asked for."""

import os
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


def open_session(path: Path, provider: Provider, threads: int = 0) -> "onnxruntime.InferenceSession":
    """Load a graph on one provider, and on no other.

    Parameters
    ----------
    path : Path
        The .onnx file.
    provider : {"cpu", "cuda"}
        Where to run.
    threads : int
        Of one operator; 0 takes every core that this process may use.

    Raises
    ------
    ProviderUnavailable
        onnxruntime is not installed, or would run elsewhere than asked: it lists CUDA where its
        libraries are missing and then quietly runs on the CPU.
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
    options.log_severity_level = 3
    if provider == "cuda" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    try:
        session = ort.InferenceSession(str(path), options, providers=[wanted])
    except Exception as error:  # onnxruntime raises many unrelated classes
        raise DamagedBundle(
            f"{path.name} could not be loaded ({type(error).__name__}).",
            expected="an ONNX graph that this onnxruntime reads.",
            advice="Install the bundle again, or upgrade onnxruntime.",
        ) from error
    if session.get_providers()[0] != wanted:
        raise _unavailable(provider, f"the session fell back to {session.get_providers()[0]}")
    return session


def as_callable(session: "onnxruntime.InferenceSession") -> Any:
    """The session's only output as a function of its inputs, in the graph's order.

    It raises `OutOfMemory` where onnxruntime could not allocate.
    """
    names = [i.name for i in session.get_inputs()]
    output = session.get_outputs()[0].name

    def run(*arrays: Any) -> FloatArray:
        try:
            result: FloatArray = session.run([output], dict(zip(names, arrays, strict=True)))[0]
        except Exception as error:
            if not any(sign in str(error).lower() for sign in ALLOCATION_FAILED):
                raise
            raise OutOfMemory(
                "onnxruntime could not allocate the memory of a network evaluation.",
                expected="memory for one batch.",
                advice="Give the worker more memory.",
            ) from None
        return result

    return run


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
        advice="Set COUNTERPART_PROVIDER=cpu, or install counterpart[gpu] in an environment without counterpart[cpu].",
    )
