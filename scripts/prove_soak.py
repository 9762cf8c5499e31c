#!/usr/bin/env python3
"""Mixed traffic for a long time: memory and open files stay flat, and status calls are answered soon.

    python -m scripts.prove_soak --minutes 20

One `counterpart serve`, as anyone starts it, with the shipped model, which keeps every core busy. Beside
good scans come bad and damaged uploads, cancels, slow senders and readers, and clients that hang up;
another process asks for the state of jobs and measures how long that takes.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from app.runtime.bundle import shipped_models
from app.sample import make_sample
from scripts.fleet import fleet
from scripts.soak_traffic import Traffic, probe

P99_SECONDS = 0.05
# Within which a cancelled scan's worker is free again.
LET_GO_SECONDS = 1.0
# Between two looks at the process.
LOOK_SECONDS = 2.0
# Analysed before anything is measured.
WARM_UP_SCANS = 2
# Flat: what the last third has beyond the middle one. The first is for warming up.
MORE_MEMORY_MB, MORE_FILES = 32.0, 3


@dataclass(frozen=True)
class Look:
    """What a process and its children hold.

    Attributes
    ----------
    megabytes : float
        Resident.
    files : int
        Open file handles.
    cores : float
        Processor seconds so far, with those of children that have ended.
    """

    megabytes: float
    files: int
    cores: float


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for task in Path(f"/proc/{pid}/task").iterdir():
        if task.name != str(pid):
            children += (task / "children").read_text().split()
    return [pid, *(member for child in children for member in family(int(child)))]


def look(pid: int) -> Look:
    """Look at a process and its children."""
    page, tick = os.sysconf("SC_PAGE_SIZE") / 1e6, os.sysconf("SC_CLK_TCK")
    megabytes, files, cores = 0.0, 0, 0.0
    for member in family(pid):
        proc = Path(f"/proc/{member}")
        megabytes += int((proc / "statm").read_text().split()[1]) * page
        files += len(list((proc / "fd").iterdir()))
        # utime, stime, cutime, cstime: where a cancelled scan's process was killed, its work is its parent's.
        cores += sum(map(int, (proc / "stat").read_text().rpartition(")")[2].split()[11:15])) / tick
    return Look(megabytes, files, cores)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that so large a share does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def watch(pid: int, ended: threading.Event) -> list[Look]:
    """Look until told to end."""
    looks = []
    while not ended.wait(LOOK_SECONDS):
        try:
            looks.append(look(pid))
        except FileNotFoundError:  # a thread or a child ended between two reads
            continue
    return looks


def prove(folder: Path, minutes: float) -> bool:
    """Run it, print what happened, and tell whether all is well."""
    scan = make_sample(folder / "sample").scan.read_bytes()
    with fleet(folder / "soak", models=str(shipped_models()), threads="0", queue_limit="1000") as service:
        node = service.start("serve")
        node.wait_until_ready()
        jobs, ended = folder / "soak" / "store" / "jobs", threading.Event()
        traffic = Traffic(node.port, scan, jobs)
        traffic.warm_up(WARM_UP_SCANS)
        start, before = time.monotonic(), look(node.process.pid)
        traffic.start()
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            probed = pool.submit(probe, node.port, minutes * 60)
            threading.Timer(minutes * 60, ended.set).start()
            looks = watch(node.process.pid, ended)
            calls = probed.result()
        seconds, after = time.monotonic() - start, looks[-1]
        traffic.stop()
        left = list((folder / "soak" / "store" / "incoming").iterdir())
    third = len(looks) // 3
    middle, last = looks[third : 2 * third], looks[2 * third :]
    memory = [statistics.median(look.megabytes for look in part) for part in (middle, last)]
    files = [statistics.median(look.files for look in part) for part in (middle, last)]
    counts, faults = traffic.tally.counts, traffic.tally.faults
    p99 = quantile(calls["status"], 0.99)
    busy = (after.cores - before.cores) / seconds
    print(f"minutes             {seconds / 60:.1f}; the service kept {busy:.2f} of {os.cpu_count()} cores busy")
    for what, count in sorted(counts.items()):
        print(f"  {what:27s} {count}")
    for kind, taken in calls.items():
        parts = ", ".join(f"p{share:.4g} {1000 * quantile(taken, share / 100):.1f}" for share in (50, 95, 99, 99.9))
        print(f"{kind + ' calls':20s}{len(taken)}; ms: {parts}, longest {1000 * max(taken):.1f}")
    let_go = max(traffic.tally.let_go_seconds, default=0.0)
    print(f"cancel answered     within {1000 * max(traffic.tally.cancel_seconds, default=0):.0f} ms")
    print(f"worker let go       within {1000 * let_go:.0f} ms of a cancel")
    print(f"memory              {memory[0]:.0f} MB in the middle third, {memory[1]:.0f} in the last")
    print(f"open files          {files[0]:.0f} in the middle third, {files[1]:.0f} in the last")
    print(f"uploads left over   {len(left)}")
    for fault in faults[:20]:
        print(f"FAULT               {fault}")
    flat = memory[1] - memory[0] < MORE_MEMORY_MB and files[1] - files[0] <= MORE_FILES
    return flat and p99 < P99_SECONDS and let_go < LET_GO_SECONDS and not faults and not left


def main() -> int:
    """Parse, prove, leave with 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="counterpart-soak-") as folder:
        well = prove(Path(folder), wanted.minutes)
    print("PROVED" if well else "FAILED")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
