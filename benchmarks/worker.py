"""One process per row, so that each row has its own memory and start-up. It waits while other rows are timed."""

import resource
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.rows import FLOAT32, ONNX_ROWS, Row
from benchmarks.trace import count_evaluations

KIB = 1024


@dataclass(frozen=True)
class Inputs:
    """Inputs of all rows.

    Attributes
    ----------
    bundle, config, scan : Path
    sample : int or None
        Number of slices that replaces the rows' own.
    cases : int
        Number of synthetic lesions.
    """

    bundle: Path
    config: Path
    scan: Path
    sample: int | None = None
    cases: int = 0


class RowBenchmark:
    """One row, ready to be timed.

    Parameters
    ----------
    row : Row
    inputs : Inputs
    """

    work: Callable[[], object]
    allocate: Callable[[], object]
    detect: Callable[[Any], Any]
    slices: int
    sample: int

    def __init__(self, row: Row, inputs: Inputs) -> None:
        from app.ingest.reader import read_scan
        from app.runtime.bundle import load_bundle

        self.row, self.inputs, self.counts = row, inputs, Counter[str]()
        with TemporaryDirectory() as scratch:
            self.volume = read_scan(inputs.scan, scratch=Path(scratch)).volume
        if row.name in ONNX_ROWS:
            bundle = load_bundle(inputs.bundle, quantised=row.name != FLOAT32)
            self.manifest, self.baselines = bundle.manifest, None
            self._prepare_volume(count_evaluations(bundle.networks, self.counts))
            return
        from benchmarks.methods import TorchBaselines
        from training.config import Config

        self.baselines = TorchBaselines(inputs.bundle, Config.load(inputs.config), self.counts)
        self.manifest = self.baselines.manifest
        if row.sample is None:
            self._prepare_volume(self.baselines.networks)
        else:
            self._prepare_sample(inputs.sample or row.sample)

    def _prepare_volume(self, networks: Any) -> None:
        """Time the method of the bundle on the whole volume, from the volume in memory, with resampling."""
        from app.pipeline.methods import METHODS

        batched = networks.in_batches(self.row.batch, lambda _: None)
        self.detect = lambda volume: METHODS[self.manifest.method](volume, batched, self.manifest)

        def work() -> None:
            self.slices = self.sample = int(self.detect(self.volume).analysed.sum())

        self.work = self.allocate = work

    def _prepare_sample(self, count: int) -> None:
        """Time a method on evenly spaced slices, after preprocessing."""
        from app.pipeline.preprocess import analysed_slices, to_slices

        assert self.baselines is not None
        slices = to_slices(self.volume, self.manifest.preprocessing)
        analysed = analysed_slices(slices, self.manifest.preprocessing)
        chosen = choose_evenly(analysed, min(count, len(analysed)))
        x, foreground = slices.x[chosen], slices.foreground[chosen]
        self.slices, self.sample = len(analysed), len(chosen)
        method, encode = self.baselines.method(self.row, self.row.stride), self.baselines.networks.encode
        self.work = lambda: method(x, foreground)
        # The methods evaluate networks hundreds of times. One evaluation of the encoder is enough to allocate memory.
        self.allocate = lambda: encode(x)

    def warm_up(self) -> dict[str, Any]:
        """Run once without timing, because the first evaluations allocate memory."""
        self.allocate()
        return {}

    def time(self) -> dict[str, Any]:
        """Time one repeat."""
        self.counts.clear()
        if self.baselines is not None:
            self.baselines.loop_seconds = 0.0
        start = time.perf_counter()
        self.work()
        return {
            "seconds": time.perf_counter() - start,
            "loop_seconds": self.baselines.loop_seconds if self.baselines is not None else 0.0,
            "slices": self.slices,
            "sample": self.sample,
            "stride": self.row.stride,
            "counts": dict(self.counts),
        }

    def memory(self) -> dict[str, Any]:
        """Return the peak memory so far."""
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB}

    def accuracy(self) -> dict[str, Any]:
        """Measure best-achievable Dice and AUPRC."""
        from benchmarks.accuracy import healthy_threshold, measure_accuracy
        from training.config import Config

        config = Config.load(self.inputs.config)
        if self.row.sample is not None:
            assert self.baselines is not None
            self.baselines.threshold = healthy_threshold(config, self.manifest, self.baselines.latent_kl)
        return measure_accuracy(config, self.manifest, self.inputs.cases, self.anomaly_map)

    def anomaly_map(self, volume: Any, x: Any, foreground: Any, chosen: Any) -> Any:
        """Return the anomaly map of some slices, (M, H, W).

        Parameters
        ----------
        volume : Volume
        x, foreground : ndarray
            The chosen slices.
        chosen : (M,) ndarray of int
            Their indices among the analysed slices of the volume.
        """
        from app.pipeline.scores import erode_foreground

        if self.row.sample is None:
            detection = self.detect(volume)
            return np.asarray(detection.anomaly[np.flatnonzero(detection.analysed)[chosen]], dtype=np.float32)
        assert self.baselines is not None
        # The service erodes the foreground, so the other methods are scored without its edge too.
        inner = erode_foreground(foreground, self.manifest.residual.erosion)
        return np.asarray(self.baselines.method(self.row)(x, foreground) * inner, dtype=np.float32)


def choose_evenly(indices: Any, count: int) -> Any:
    """Choose `count` evenly spaced indices."""
    return indices[np.unique(np.linspace(0, len(indices) - 1, count).round().astype(int))]


class RowProcess:
    """Process of a row.

    Parameters
    ----------
    row : Row
    inputs : Inputs

    Attributes
    ----------
    cold_seconds : float
        Seconds from the start of the process until the row is ready.
    """

    def __init__(self, row: Row, inputs: Inputs) -> None:
        start = time.perf_counter()
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _prepare, (row, inputs))
        self._pool.submit(int).result()
        self.cold_seconds = time.perf_counter() - start

    def call(self, method: str) -> dict[str, Any]:
        """Call a method of `RowBenchmark` in the process and return its result."""
        return self._pool.submit(_call, method).result()

    def close(self) -> None:
        """Stop the process."""
        self._pool.shutdown()


# Set in the process of a row only.
_benchmark: RowBenchmark


def _prepare(row: Row, inputs: Inputs) -> None:
    global _benchmark  # noqa: PLW0603 - the initializer of a pool has no other way to pass an object on
    _benchmark = RowBenchmark(row, inputs)


def _call(method: str) -> dict[str, Any]:
    result: dict[str, Any] = getattr(_benchmark, method)()
    return result
