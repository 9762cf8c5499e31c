"""Proof: under mixed traffic for a long time, memory and open files stay flat and status calls are fast.

    python -m tests.proofs.soak --minutes 20

One `counterpart serve` runs with its defaults and a shipped model, which uses every core. The traffic contains good,
bad and damaged uploads, cancellations, slow senders and readers, and clients that hang up. Other processes request
the state of jobs and measure the latency.
"""

import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from app.runtime.bundle import shipped_models
from app.sample import make_sample
from tests.proofs.deployment import deploy, print_row, run_proof
from tests.proofs.traffic import Traffic, measure_latency

MAX_P99_SECONDS = 0.05
# The longest time until the worker of a cancelled scan is free.
MAX_RELEASE_SECONDS = 1.0
SAMPLE_SECONDS = 2.0
# Scans that are analysed before the measurement starts.
WARM_UP_SCANS = 2
# The accepted growth from the middle third to the last. The first third is for warming up.
MAX_MEMORY_GROWTH_MB, MAX_FILE_GROWTH = 32.0, 3


@dataclass(frozen=True)
class ResourceUsage:
    """Resources of a process and its descendants.

    Attributes
    ----------
    megabytes : float
        Resident memory in MB.
    files : int
        Open file descriptors.
    core_seconds : float
        Processor time so far, with that of children that have ended.
    """

    megabytes: float
    files: int
    core_seconds: float


def process_tree(pid: int) -> list[int]:
    """Return the ids of a process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for task in Path(f"/proc/{pid}/task").iterdir():
        if task.name != str(pid):
            children += (task / "children").read_text().split()
    return [pid, *(member for child in children for member in process_tree(int(child)))]


def measure_usage(pid: int) -> ResourceUsage:
    """Return the resource usage of a process and its descendants."""
    page, tick = os.sysconf("SC_PAGE_SIZE") / 1e6, os.sysconf("SC_CLK_TCK")
    megabytes, files, core_seconds = 0.0, 0, 0.0
    for member in process_tree(pid):
        proc = Path(f"/proc/{member}")
        megabytes += int((proc / "statm").read_text().split()[1]) * page
        files += len(list((proc / "fd").iterdir()))
        # utime, stime, cutime and cstime, because the time of a killed child process counts for its parent.
        core_seconds += sum(map(int, (proc / "stat").read_text().rpartition(")")[2].split()[11:15])) / tick
    return ResourceUsage(megabytes, files, core_seconds)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is not exceeded by a share of the values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def sample_usage(pid: int, stopped: threading.Event) -> list[ResourceUsage]:
    """Measure the resource usage repeatedly until the event is set."""
    samples = []
    while not stopped.wait(SAMPLE_SECONDS):
        try:
            samples.append(measure_usage(pid))
        except FileNotFoundError:  # a thread or a child ended during the measurement
            continue
    return samples


def prove(folder: Path, *, minutes: float = 20.0) -> bool:
    """Run the proof, print its table and return whether it holds."""
    scan = make_sample(folder / "sample").scan.read_bytes()
    with deploy(folder / "soak", models=str(shipped_models()), threads="0", queue_limit="1000") as deployment:
        service = deployment.start("serve")
        service.wait_until_ready()
        store, stopped = folder / "soak" / "store", threading.Event()
        traffic = Traffic(service.port, scan, store / "jobs")
        traffic.warm_up(WARM_UP_SCANS)
        start, before = time.monotonic(), measure_usage(service.process.pid)
        traffic.start()
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            latencies = pool.submit(measure_latency, service.port, minutes * 60)
            threading.Timer(minutes * 60, stopped.set).start()
            samples = sample_usage(service.process.pid, stopped)
            calls = latencies.result()
        seconds, after = time.monotonic() - start, samples[-1]
        traffic.stop()
        left_over = list((store / "incoming").iterdir())
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    memory = [statistics.median(sample.megabytes for sample in part) for part in (middle, last)]
    files = [statistics.median(sample.files for sample in part) for part in (middle, last)]
    log = traffic.log
    busy = (after.core_seconds - before.core_seconds) / seconds
    release_seconds = max(log.release_seconds, default=0.0)
    print_row("minutes", f"{seconds / 60:.1f}; the service used {busy:.2f} of {os.cpu_count()} cores")
    for event, count in sorted(log.counts.items()):
        print_row(f"  {event:27s}", count)
    for kind, taken in calls.items():
        parts = ", ".join(f"p{share:.4g} {1000 * quantile(taken, share / 100):.1f}" for share in (50, 95, 99, 99.9))
        print_row(f"{kind} calls", f"{len(taken)}; ms: {parts}, longest {1000 * max(taken):.1f}")
    print_row("cancel answered", f"within {1000 * max(log.cancel_seconds, default=0):.0f} ms")
    print_row("worker free", f"within {1000 * release_seconds:.0f} ms of a cancel")
    print_row("memory", f"{memory[0]:.0f} MB in the middle third, {memory[1]:.0f} in the last")
    print_row("open files", f"{files[0]:.0f} in the middle third, {files[1]:.0f} in the last")
    print_row("uploads left over", len(left_over))
    for failure in log.failures[:20]:
        print_row("FAILURE", failure)
    is_flat = memory[1] - memory[0] < MAX_MEMORY_GROWTH_MB and files[1] - files[0] <= MAX_FILE_GROWTH
    is_fast = quantile(calls["status"], 0.99) < MAX_P99_SECONDS and release_seconds < MAX_RELEASE_SECONDS
    return is_flat and is_fast and not log.failures and not left_over


if __name__ == "__main__":
    sys.exit(run_proof(prove, __doc__))
