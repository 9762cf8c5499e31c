#!/usr/bin/env python3
"""What opening the sessions costs, and what a cache of optimised graphs would save, in the processor's milliseconds.

python -m scripts.time_load
"""

import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import onnxruntime as ort

from app.runtime.bundle import shipped_models

GRAPHS = ("t1-1.6.0/encoder", "t1-1.6.0/denoiser", "t1-1.6.0/decoder", "deepbet-1.0.2/coarse", "deepbet-1.0.2/fine")
REPEATS = 12


def milliseconds(call: Callable[[], object]) -> float:
    """Median of the processor's time."""
    taken = []
    for _ in range(REPEATS):
        start = time.process_time()
        call()
        taken.append(1000 * (time.process_time() - start))
    return median(taken)


def opened(path: Path, *, optimise: bool, save: str = "") -> ort.InferenceSession:
    """A session; what it optimised is kept where `save` says."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = save
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Print a line a graph, and the sums."""
    rows = []
    with TemporaryDirectory() as folder:
        cached = Path(folder) / "cached.onnx"
        for name in GRAPHS:
            path = shipped_models() / f"{name}.onnx"
            opened(path, optimise=True, save=str(cached))
            plain = milliseconds(partial(opened, path, optimise=True))
            kept = milliseconds(lambda: opened(cached, optimise=False))
            check = milliseconds(lambda: hashlib.sha256(cached.read_bytes()).hexdigest())
            rows.append((plain, kept, check))
            print(f"{name:22} open {plain:5.1f}, from a cache {kept:5.1f}, its hash {check:5.1f}")
    plain, kept, check = (sum(column) for column in zip(*rows, strict=True))
    saved = plain - kept - check
    print(f"{'all':22} open {plain:5.1f}, from a cache {kept:5.1f}, its hash {check:5.1f}: saved {saved:.1f}")


if __name__ == "__main__":
    main()
