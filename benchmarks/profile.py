"""What bounds the networks: seconds of each kind of operator, beside what the machine can do at most."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from app.manifest import Manifest
from app.runtime.bundle import CPU_BATCH, read_manifest

RUNS = 8
IN_INT8 = "QLinearConv"
# Megabytes that are copied to find the memory's speed: many times the caches.
COPIED = 256
# Which input of a convolution holds its weights; in int8 its other inputs' scales and zero points stand before.
WEIGHTS = {"Conv": 1, IN_INT8: 3}


def memory_gigabytes() -> float:
    """Thousand million bytes a second, read and written, in a large copy."""
    source = np.ones(COPIED * 2**20, np.uint8)
    target = np.empty_like(source)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds) / 1e9


def feeds(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """One batch for each network; their speed does not depend on what is in it."""
    rng = np.random.default_rng(0)
    x = rng.random((CPU_BATCH, 1, *manifest.preprocessing.shape), dtype=np.float32)
    z = rng.standard_normal((CPU_BATCH, *manifest.latent_shape), dtype=np.float32)
    t = np.full(CPU_BATCH, manifest.kl.timesteps[0], np.int64)
    return {"encoder": {"x": x}, "denoiser": {"z_t": z, "t": t}, "decoder": {"z0": z}}


def profile_network(path: Path, feed: dict[str, Any]) -> list[dict[str, Any]]:
    """Operators of one evaluation of a batch, as onnxruntime's own profiler sees them; the slowest first."""
    import onnxruntime

    with TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as the service
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS + 1):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    return operators(events, RUNS)


def operators(events: Iterable[dict[str, Any]], runs: int) -> list[dict[str, Any]]:
    """Seconds, operations and bytes of one evaluation, by kind of operator; the first evaluation is left out."""
    calls: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            calls[event["name"]].append(event)
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: {"seconds": 0.0, "gigaflop": 0.0, "gigabytes": 0.0})
    for node in calls.values():
        for event in node[-runs:]:
            kind = kinds[event["args"]["op_name"]]
            kind["seconds"] += event["dur"] / 1e6 / runs
            kind["gigaflop"] += operations(event["args"]) / 1e9 / runs
            moved = sum(int(event["args"].get(f"{what}_size", 0)) for what in ("activation", "parameter", "output"))
            kind["gigabytes"] += moved / 1e9 / runs
    return [{"operator": name, **kinds[name]} for name in sorted(kinds, key=lambda n: -kinds[n]["seconds"])]


def shapes(call: dict[str, Any], side: str) -> list[list[int]]:
    """Of the inputs or outputs of a call."""
    return [next(iter(one.values()), []) for one in call.get(f"{side}_type_shape", ())]


def operations(call: dict[str, Any]) -> float:
    """Of a convolution or a matrix product, two for a multiply and an add; 0 for anything else."""
    inputs, outputs = _shapes(call, "input"), _shapes(call, "output")
    if not outputs or not inputs:
        return 0.0
    weights = WEIGHTS.get(call["op_name"])
    if weights is not None and len(inputs) > weights:
        return 2 * float(np.prod(outputs[0])) * float(np.prod(inputs[weights][1:]))
    if any(word in call["op_name"] for word in ("MatMul", "Gemm", "Einsum")):
        # Weights that were packed beforehand have no shape here: each input value meets every column of the output.
        return 2.0 * float(np.prod(inputs[0])) * outputs[0][-1]
    return 0.0


def _shapes(call: dict[str, Any], side: str) -> list[list[int]]:
    return [next(iter(one.values()), []) for one in call.get(f"{side}_type_shape", ())]


def measure_profile(folder: Path) -> dict[str, Any]:
    """Each network of a bundle as it is served, and the memory's speed."""
    manifest = read_manifest(folder)
    wanted = feeds(manifest)
    served = manifest.files.model_copy(update={"denoiser": manifest.files.denoiser_int8 or manifest.files.denoiser})
    found = {name: profile_network(folder / getattr(served, name).name, feed) for name, feed in wanted.items()}
    return {"networks": found, "memory": memory_gigabytes(), "batch": CPU_BATCH}
