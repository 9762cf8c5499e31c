#!/usr/bin/env python3
"""What a step of its own costs a scan: the file between inference and export, written, synced and read.

python -m scripts.time_steps ../shared/data/t1_ds002748/sub-30_T1w.nii.gz

Beside it stands what it saves: an inference, where a worker dies before its results are published.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from app.analysis import AnalysisRequest
from app.inference_result import load_inference_result, save_inference_result
from app.ingest import read
from app.jobs.engine import INFERRED, BundleEngine
from app.jobs.store import Store

JOB = "0" * 16 + "-" + "0" * 16


def milliseconds(repeats: int, call: Callable[[], object]) -> float:
    """Median time of a call."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - start))
    return median(taken)


def measure(scan: Path, folder: Path, repeats: int) -> None:
    """Infer once, then write, sync and read what was inferred; print it."""
    store = Store(folder)
    (folder / "jobs" / JOB).mkdir()
    work = store.work(JOB)
    engine = BundleEngine(None, "cpu", 0)
    engine.warm_up()
    start = time.perf_counter()
    engine.infer(scan, work, AnalysisRequest(), lambda *_: None)
    seconds = time.perf_counter() - start
    file = work / INFERRED
    inferred = load_inference_result(file)
    megabytes = file.stat().st_size / 1e6
    names: list[str] = []

    def write_and_sync() -> None:
        save_inference_result(inferred, work / "again")
        names.append(store.hold(JOB, work / "again"))

    print(f"file                {megabytes:.1f} MB; the scan {scan.stat().st_size / 1e6:.1f} MB")
    print(f"infer               {seconds:.2f} s, writing included")
    print(f"write               {milliseconds(repeats, lambda: save(inferred, work / 'again')):.0f} ms")
    print(f"write and sync      {milliseconds(repeats, write_and_sync):.0f} ms")
    print("the step after another worker's death, in place of the inference:")
    print(f"read the file       {milliseconds(repeats, lambda: load(file)):.0f} ms")
    print(f"read the scan       {milliseconds(repeats, lambda: read(scan, scratch=work)):.0f} ms")
    engine.close()


def main() -> int:
    """Parse, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    wanted = parser.parse_args()
    with TemporaryDirectory(prefix="counterpart-steps-") as folder:
        measure(wanted.scan, Path(folder), wanted.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
