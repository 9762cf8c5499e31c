"""A process of its own for each row, so that memory and start are its own; it waits while others are measured."""

import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.rows import FLOAT32, SERVED, Row

KIB = 1024


@dataclass(frozen=True)
class Job:
    """What every row is measured on.

    Attributes
    ----------
    bundle, config, scan : Path
    sample : int or None
        Overrides the rows' own sample.
    cases : int or None
        Synthetic lesions, the first so many; None takes all.
    """

    bundle: Path
    config: Path
    scan: Path
    sample: int | None = None
    cases: int | None = None


class Measured:
    """One row, ready to be timed.

    Parameters
    ----------
    row : Row
    job : Job
    """

    def __init__(self, row: Row, job: Job) -> None:
        from app.ingest.reader import read_scan
        from app.pipeline.prepare import analysed_slices, to_slices
        from app.runtime.bundle import load_bundle

        self.row, self.job, self.counts = row, job, Counter[str]()
        with TemporaryDirectory() as scratch:
            self.volume = read_scan(job.scan, scratch=Path(scratch)).volume
        if row.name in SERVED:
            bundle = load_bundle(job.bundle, quantised=row.name != FLOAT32)
            self.manifest, models = bundle.manifest, bundle.models
        else:
            from benchmarks.methods import Peers
            from training.config import Config

            self.peers = Peers(job.bundle, Config.load(job.config), self.counts)
            self.manifest, models = self.peers.manifest, self.peers.models
        if row.sample is None:
            self.whole(models)
            return
        slices = to_slices(self.volume, self.manifest.preparation)
        known = analysed_slices(slices, self.manifest.preparation)
        self.slices = len(known)
        chosen = spread(known, min(job.sample or row.sample, len(known)))
        x, foreground = slices.x[chosen], slices.foreground[chosen]
        self.sample = len(chosen)
        method = self.peers.method(row, row.every)
        self.work: Callable[[], object] = lambda: method(x, foreground)
        self.warm: Callable[[], object] = lambda: self.peers.models.encode(x)

    def whole(self, models: Any) -> None:
        """Measure `detect` with these models on the whole volume, resampling included."""
        from app.pipeline.detect import detect

        counted = models
        if self.row.name in SERVED:
            from benchmarks.counted import counting

            counted = counting(models, self.counts)
        batched = counted.in_batches(self.row.batch, lambda _: None)
        self.detect: Callable[[Any], Any] = lambda volume: detect(volume, batched, self.manifest)
        self.slices = self.sample = 0  # known after the first run

        def work() -> None:
            self.slices = self.sample = int(self.detect(self.volume).analysed.sum())

        self.work = self.warm = work

    def prepare(self) -> dict[str, Any]:
        """First calls allocate: a whole volume once; where hundreds of evaluations are measured, the encoder alone."""
        self.warm()
        return {}

    def time(self) -> dict[str, Any]:
        """One repeat."""
        self.counts.clear()
        peers = None if self.row.name in SERVED else self.peers
        before = peers.loop_seconds if peers else 0.0
        start = time.perf_counter()
        self.work()
        seconds = time.perf_counter() - start
        looped = peers.loop_seconds - before if peers else 0.0
        sizes = {"slices": self.slices, "sample": self.sample, "every": self.row.every}
        return {"seconds": seconds, "loop_seconds": looped, **sizes, "counts": dict(self.counts)}

    def facts(self) -> dict[str, Any]:
        """Peak memory so far, and what an evaluation costs."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
        gigaflops = {} if self.row.name in SERVED else self.peers.gigaflops(self.row)
        return {"peak_bytes": peak, "gigaflops": gigaflops}

    def accuracy(self) -> dict[str, Any]:
        """Best-achievable Dice and AUPRC of each case, where the weights are trained."""
        from benchmarks.accuracy import judge

        return judge(self)


def spread(known: Any, count: int) -> Any:
    """So many of the slices, evenly."""
    return known[np.unique(np.linspace(0, len(known) - 1, count).round().astype(int))]


def serve(row: Row, job: Job, wire: Connection) -> None:
    """Answer until the parent is gone or says stop."""
    measured = Measured(row, job)
    wire.send({"ready": True})
    while (asked := wire.recv()) != "stop":
        wire.send(getattr(measured, asked)())


class Worker:
    """A row's process, from outside.

    Parameters
    ----------
    row : Row
    job : Job
    """

    def __init__(self, row: Row, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._wire, theirs = context.Pipe()
        start = time.perf_counter()
        self._process = context.Process(target=serve, args=(row, job, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.ask(None)
        self.cold_seconds = time.perf_counter() - start

    def ask(self, what: str | None) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises
        ------
        EOFError
            The process died; its own traceback says why.
        """
        if what is not None:
            self._wire.send(what)
        answer: dict[str, Any] = self._wire.recv()
        return answer

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._process.terminate()
        self._process.join()
