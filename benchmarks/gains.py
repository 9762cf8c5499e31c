"""What each way to be fast gains: written down before as a formula, then measured by switching it off."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from app.ingest.reader import read_scan
from app.pipeline.prepare import to_slices
from app.runtime.bundle import load_bundle
from benchmarks.ceiling import Ceiling
from training.config import Config


@dataclass(frozen=True)
class Switch:
    """One way to be fast.

    Attributes
    ----------
    name, reason : str
        What it is; where the prediction comes from.
    predicted : float
        How many times less it takes.
    without, with_it : callable
        Each does the work.
    times : float
        What the seconds of `without` are multiplied by, where it does a part of its work.
    """

    name: str
    reason: str
    predicted: float
    without: Callable[[], object]
    with_it: Callable[[], object]
    times: float = 1.0

    def measure(self, repeats: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
        """Both in turns, after each has worked once."""
        found: dict[str, list[float]] = {"without": [], "with_it": []}
        for _ in range(repeats + 1):
            for key, factor in (("without", self.times), ("with_it", 1.0)):
                start = clock()
                getattr(self, key)()
                found[key].append((clock() - start) * factor)
        timed = {key: seconds[1:] for key, seconds in found.items()}
        return {"name": self.name, "reason": self.reason, "predicted": self.predicted, **timed}


def measure_gains(folder: Path, config: Path, scan: Path, repeats: int) -> list[dict[str, Any]]:
    """Every switch, one after the other.

    Parameters
    ----------
    folder : Path
        The bundle.
    config : Path
        That it was trained by.
    scan : Path
    repeats : int
    """
    from benchmarks import switches
    from benchmarks.bench import Bench
    from benchmarks.methods import network_gigaflops
    from benchmarks.switches_host import hosts

    bundle = load_bundle(folder)
    gigaflop = network_gigaflops(folder, Config.load(config))["denoise"]
    with TemporaryDirectory() as scratch:
        volume = read_scan(scan, scratch=Path(scratch)).volume
        bench = Bench(bundle, to_slices(volume, bundle.manifest.preparation))
        kinds: tuple[Iterable[Switch], ...] = (
            switches.skips(bench),
            switches.evaluations(bench, gigaflop, Ceiling().time()),
            switches.files(bench, Path(scratch)),
            switches.imports(),
            hosts(bench, Path(scratch)),
        )
        return [switch.measure(repeats) for kind in kinds for switch in kind]
