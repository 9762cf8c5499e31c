"""Over HTTP, as a hospital uses it: from the first byte of an upload to the last byte of its mask."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2

from app.jobs.job import ENDED_STATES
from tests.proofs.deployment import URL, deploy
from tests.proofs.soak import process_tree

# A client asks this often whether its scan is done: half of it is, on average, in every time measured here.
ASK_SECONDS = 0.05
LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class Served:
    """A running service.

    Attributes
    ----------
    base : str
        Its address.
    processes : tuple of int
        Of the API and of the workers; their children are found from them.
    seeds : iterator of int
        One for each upload: the same bytes with the same seed would give the job that there is already.
    """

    url: str
    processes: tuple[int, ...]
    seeds: Iterator[int] = field(default_factory=count)

    def peak_bytes(self) -> int:
        """Largest resident memory of every process so far, added: an upper bound of what all held at once."""
        members = {member for process in self.processes for member in process_tree(process)}
        return sum(_peak(member) for member in members)

    def analyse(self, scan: Path) -> dict[str, Any]:
        """Upload a scan, wait, fetch its mask: the seconds of it all, and what the report says of them.

        Raises
        ------
        RuntimeError
            The scan was not analysed.
        """
        with httpx2.Client(base_url=self.url, timeout=LIMIT_SECONDS) as client:
            start = time.perf_counter()
            with scan.open("rb") as file:
                answer = client.post(URL, content=file, params={"seed": next(self.seeds)})
            answer.raise_for_status()
            uploaded = time.perf_counter() - start
            job = f"{URL}/{answer.json()['id']}"
            while (found := client.get(job).json())["state"] not in ENDED_STATES:
                if time.perf_counter() - start > LIMIT_SECONDS:
                    raise RuntimeError(f"{scan.name} took longer than {LIMIT_SECONDS:.0f} s")
                time.sleep(ASK_SECONDS)
            if found["state"] != "succeeded":
                raise RuntimeError(f"{scan.name}: {found['state']}, {found.get('error')}")
            client.get(f"{job}/mask.nii.gz").raise_for_status()
            seconds = time.perf_counter() - start
            report = client.get(f"{job}/report.json").json()
        return {
            "id": report["model"]["id"],
            "seconds": seconds,
            "upload": uploaded,
            "work": report["work"],
            "findings": len(report["findings"]),
        }

    def together(self, scans: Sequence[Path]) -> float:
        """Seconds until all of them, sent at once, have their masks."""
        start = time.perf_counter()
        with ThreadPoolExecutor(len(scans)) as clients:
            list(clients.map(self.analyse, scans))
        return time.perf_counter() - start


def _peak(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


@contextmanager
def serve(models: Path, workers: int = 0, threads: int = 0) -> Iterator[Served]:
    """`counterpart serve` on a free port, ready; everything it keeps goes with the block.

    Parameters
    ----------
    models : Path
        Folder of bundles.
    workers : int
        Processes of `counterpart worker`; 0 leaves the analysis to the service itself.
    threads : int
        Of one network evaluation; 0 takes every core.
    """
    with TemporaryDirectory() as folder, deploy(Path(folder), models=str(models), threads=str(threads)) as all_of_it:
        api = all_of_it.start("serve", *(["--no-worker"] if workers else []))
        others = [all_of_it.start("worker") for _ in range(workers)]
        for node in (api, *others):
            node.wait_until_ready()
        yield Served(api.url, tuple(node.process.pid for node in (api, *others)))


def fresh(scan: Path, models: Path, repeats: int) -> dict[str, Any]:
    """A service that has just started, then the same scan again: the first run opens the networks."""
    with serve(models) as served:
        runs = [served.analyse(scan) for _ in range(repeats + 1)]
        return {"megabytes": scan.stat().st_size / 1e6, "runs": runs, "peak_bytes": served.peak_bytes()}
