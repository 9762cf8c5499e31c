"""Times of the whole program: uploads to `counterpart serve` over HTTP, and the start of the command line."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2

from app.jobs.job import ENDED_STATES

SCANS = "/v1/scans"
# A scan's end is noticed half of this later on average.
POLL_SECONDS = 0.05
LIMIT_SECONDS = 600.0
COMMAND = (sys.executable, "-m", "app.cli")


@dataclass(frozen=True)
class RunningService:
    """A `counterpart serve` process that is ready.

    Attributes
    ----------
    url : str
    pid : int
    seeds : iterator of int
        One per upload. The same bytes with the same seed would return the earlier job.
    """

    url: str
    pid: int
    seeds: Iterator[int] = field(default_factory=count)

    def peak_bytes(self) -> int:
        """Add the largest resident memory of all processes: an upper bound of their memory at one time."""
        return sum(_peak_bytes(pid) for pid in _process_tree(self.pid))

    def analyse(self, scan: Path) -> dict[str, Any]:
        """Upload a scan, wait for it, download its mask, and return the times.

        Raises
        ------
        RuntimeError
            The scan was not analysed.
        """
        with httpx2.Client(base_url=self.url, timeout=LIMIT_SECONDS) as client:
            start = time.perf_counter()
            with scan.open("rb") as file:
                answer = client.post(SCANS, content=file, params={"seed": next(self.seeds)})
            answer.raise_for_status()
            uploaded = time.perf_counter() - start
            job = f"{SCANS}/{answer.json()['id']}"
            while (found := client.get(job).json())["state"] not in ENDED_STATES:
                if time.perf_counter() - start > LIMIT_SECONDS:
                    raise RuntimeError(f"{scan.name} took longer than {LIMIT_SECONDS:.0f} s.")
                time.sleep(POLL_SECONDS)
            if found["state"] != "succeeded":
                raise RuntimeError(f"{scan.name} {found['state']}: {found.get('problem')}")
            client.get(f"{job}/mask.nii.gz").raise_for_status()
            seconds = time.perf_counter() - start
            report = client.get(f"{job}/report.json").json()
        return {"id": report["model"]["id"], "seconds": seconds, "upload": uploaded, "work": report["work"]}


@contextmanager
def run_service(models: Path, threads: int = 0) -> Iterator[RunningService]:
    """Run `counterpart serve` on a free port with a temporary store.

    Parameters
    ----------
    models : Path
        Folder of bundles.
    threads : int
        Threads of one network evaluation. 0 uses all cores.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder, Path(folder, "log").open("w+b") as log:
        settings = {"MODELS": str(models), "THREADS": str(threads), "STORE": f"{folder}/store"}
        environ = os.environ | {f"COUNTERPART_{name}": value for name, value in settings.items()}
        process = subprocess.Popen([*COMMAND, "serve", "--port", str(port)], env=environ, stdout=log, stderr=log)  # noqa: S603
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}", process, Path(log.name))
            yield RunningService(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()
            process.wait(60)


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx2.get(f"{url}/readyz", timeout=10).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"The service did not become ready. The end of its log: {log.read_text()[-2000:]}")


def _process_tree(pid: int) -> list[int]:
    """Return the ids of a process and of all its descendants."""
    children = [
        child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return [pid, *(member for child in children for member in _process_tree(int(child)))]


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def time_uploads(scan: Path, models: Path, repeats: int) -> dict[str, Any]:
    """Send a scan to a new service `repeats + 1` times. The first scan opens the networks."""
    with run_service(models) as service:
        runs = [service.analyse(scan) for _ in range(repeats + 1)]
        return {"megabytes": scan.stat().st_size / 1e6, "runs": runs, "peak_bytes": service.peak_bytes()}


def time_start(scan: Path, models: Path) -> dict[str, float]:
    """Time `counterpart --help`, and `counterpart detect` without the stages that evaluate networks on the scan.

    The second time is an upper bound of the time to the first network evaluation: it includes the end of the process.
    """
    start = time.perf_counter()
    subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)  # noqa: S603
    help_seconds = time.perf_counter() - start
    with TemporaryDirectory() as out:
        start = time.perf_counter()
        done = subprocess.run(  # noqa: S603
            [*COMMAND, "detect", str(scan), "-o", out, "--json"],
            check=True,
            capture_output=True,
            env={**os.environ, "COUNTERPART_MODELS": str(models)},
        )
        whole = time.perf_counter() - start
    stages = json.loads(done.stdout)["work"]["seconds"]
    return {"help": help_seconds, "scan": whole - stages["extract"] - stages["infer"] - stages["export"]}
