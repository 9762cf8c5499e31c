"""Proof: nothing is lost between a scanner and a PACS, however often the programs between them are killed.

    python -m tests.proofs.node --kills 40

dcmtk's storescu sends series to `counterpart node`. Segmentations and reports go to Orthanc by C-STORE. At random
moments, the node, the service, Orthanc or storescu (an association that breaks off half-way) is killed with SIGKILL and
started again. As a scanner does, the sender repeats a series until all of its images were acknowledged. In the end,
each series has exactly one job with all of its images, and Orthanc has the objects of each job, and no others.

All programs run in a network namespace with only the loopback device.
"""

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import httpx2
import pydicom

from tests.proofs.deployment import (
    URL,
    Deployment,
    ServiceProcess,
    deploy,
    list_job_ids,
    print_row,
    run_proof,
    wait_until_ended,
)
from tests.support.dicom import Series, series_uid, write_series
from tests.support.pacs import Orthanc, enter_namespace
from tests.support.phantom import LESION_MM, brain, grid, with_lesion
from tests.support.servers import free_port

Victim = Literal["node", "service", "orthanc", "sender"]
VICTIMS: tuple[Victim, ...] = ("node", "orthanc", "service", "sender")
NODE_TITLE = "COUNTERPART"
QUIET_SECONDS = 4.0
TIMEOUT_SECONDS = 1800
MANY = 1000
SHAPE, SPACING = (40, 48, 36), 4.0
MAX_SEND_SECONDS = 120
# Longest wait for a moment at which the victim is in use.
MAX_WAIT_SECONDS = 60
ROUTES = """
[targets.archive]
kind = "dimse"
host = "127.0.0.1"
port = {port}
ae_title = "ORTHANC"

[[routes]]
target = "archive"
results = ["segmentation.dcm", "report.dcm", "capture.dcm"]
"""


class Scanner(threading.Thread):
    """Sends one series after the other by storescu, each until all of its images were acknowledged."""

    def __init__(self, folder: Path, port: int, service: "Service", load: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.port, self.service, self.load = folder, port, service, load
        self.sent: dict[str, int] = {}
        self.tries = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.stopped = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        """Send series until the event `stopped` is set. The last one is sent completely."""
        try:
            while not self.stopped.is_set():
                if self.service.count_open_jobs() >= self.load:
                    self.stopped.wait(0.2)
                    continue
                number = len(self.sent)
                # Each series has its own lesion, so that its objects differ from those of the others.
                centre = (LESION_MM[0] - 0.4 * number, LESION_MM[1], LESION_MM[2])
                series = Series(name=f"series {number}")
                volume = with_lesion(brain(SHAPE, grid(SHAPE, SPACING)), centre)
                files = write_series(self.folder / str(number), volume, series)
                while not self.send(files):
                    time.sleep(0.2)
                self.sent[series_uid(series)] = len(files)
        except Exception as error:  # noqa: BLE001  # raised by the main thread
            self.error = error

    def send(self, files: list[Path]) -> bool:
        """Send files in one association, and return whether all were acknowledged."""
        self.tries += 1
        command = ["storescu", "-aec", NODE_TITLE, "-to", "10", "127.0.0.1", str(self.port), *map(str, files)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return self.process.wait(MAX_SEND_SECONDS) == 0
        except subprocess.TimeoutExpired:
            self.process.kill()
            return False


class Service:
    """The processes of the service: `serve` with its worker, and `node`."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.processes: dict[str, ServiceProcess] = {}

    def start(self, name: Literal["serve", "node"]) -> None:
        """Start a process, for the first time or again."""
        self.processes[name] = self.deployment.start(name)

    def count_open_jobs(self) -> int:
        """Return the number of waiting and running jobs, `MANY` if the service does not answer."""
        try:
            return len(self.get(URL, state=["queued", "running"])["scans"])
        except (httpx2.TransportError, KeyError):
            return MANY

    def get(self, path: str, **parameters: Any) -> Any:
        """Return the JSON of a call."""
        return httpx2.get(f"{self.processes['serve'].url}{path}", params=parameters, timeout=10).json()


def wait_for_the_middle(victim: Victim, scanner: Scanner, service: Service, rng: random.Random) -> None:
    """Wait for a moment at which the victim is in use: an association, a running job, or its end for Orthanc."""

    def is_in_use() -> bool:
        if victim in {"node", "sender"}:
            return scanner.process is not None and scanner.process.poll() is None
        running = service.get(URL, state="running")["scans"]
        return any(job["stage"] == "export" or victim == "service" for job in running)

    deadline = time.monotonic() + MAX_WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            if is_in_use():
                break
        except (httpx2.TransportError, KeyError):
            pass
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 1 if victim in {"node", "sender"} else 4))


def kill(victim: Victim, scanner: Scanner, service: Service, pacs: Orthanc) -> None:
    """Kill a program with SIGKILL, and start it again."""
    if victim == "node":
        service.processes["node"].kill()
        service.start("node")
    elif victim == "service":
        service.processes["serve"].kill()
        service.start("serve")
    elif victim == "orthanc":
        pacs.kill()
        time.sleep(1)  # long enough that a delivery meets a closed port
        pacs.start(wait=False)
    elif scanner.process is not None:
        scanner.process.kill()


def prove(folder: Path, *, kills: int = 40, seed: int = 0, load: int = 5) -> bool:
    """Run the proof, print its table and return whether it holds. At `load` open jobs, the sender waits."""
    rng = random.Random(seed)  # noqa: S311
    begun = time.monotonic()
    pacs = Orthanc(folder / "orthanc")
    port = free_port()
    (folder / "routes.toml").write_text(ROUTES.format(port=pacs.dicom_port))
    settings = {
        "node_port": str(port),
        "node_quiet_seconds": str(QUIET_SECONDS),
        "node_ae_title": NODE_TITLE,
        "routes": str(folder / "routes.toml"),
    }
    killed: Counter[str] = Counter()
    try:
        pacs.start()
        with deploy(folder / "deployment", **settings) as deployment:
            service = Service(deployment)
            service.start("serve")
            service.start("node")
            for process in service.processes.values():
                process.wait_until_ready()
            scanner = Scanner(folder / "scanner", port, service, load)
            scanner.start()
            for number in range(kills):
                victim = VICTIMS[number] if number < len(VICTIMS) else rng.choice(VICTIMS)
                wait_for_the_middle(victim, scanner, service, rng)
                kill(victim, scanner, service, pacs)
                killed[victim] += 1
                print_row(f"kill {number + 1} of {kills}", f"{victim}; {len(scanner.sent)} series sent")
                if scanner.error:
                    raise scanner.error
            pacs.wait()
            scanner.stopped.set()
            scanner.join()
            if scanner.error:
                raise scanner.error
            jobs = wait_for_jobs(service, folder / "deployment" / "store" / "node", begun + TIMEOUT_SECONDS)
            whole, objects = examine(service, jobs, scanner.sent)
            stored = Counter(instance["uid"] for instance in pacs.instances())
            attempts = sum(delivery["attempts"] for job in jobs for delivery in job["deliveries"])
    finally:
        pacs.stop()
    expected = Counter(scanner.sent.keys())
    print_row("kills", f"{dict(killed)} in {time.monotonic() - begun:.0f} s")
    print_row("series", f"{len(scanner.sent)} sent in {scanner.tries} associations")
    print_row("jobs", f"{len(jobs)}: {whole.total()} of whole series, {len(jobs) - whole.total()} of incomplete ones")
    print_row("objects", f"{len(objects)} of all jobs, {len(stored)} in Orthanc, {attempts} attempts to send")
    print_row("lost", f"{len(expected - whole)} series, {len(objects - stored.keys())} objects")
    print_row("more than once", f"{len(whole - expected)} series, {sum(n > 1 for n in stored.values())} objects")
    return whole == expected and bool(expected) and stored == Counter(objects)


def wait_for_jobs(service: Service, spool: Path, deadline: float) -> list[dict[str, Any]]:
    """Return all jobs when the node has handed over every series, and every job has ended and was delivered."""
    while time.monotonic() < deadline:
        waiting = [*(spool / "series").iterdir(), *(spool / "batches").iterdir()]
        with httpx2.Client(base_url=service.processes["serve"].url, timeout=60) as client:
            try:
                jobs = [wait_until_ended(client, job, deadline) for job in list_job_ids(client)]
            except httpx2.TransportError:
                jobs = []
        states = {delivery["state"] for job in jobs for delivery in job["deliveries"]}
        if not waiting and jobs and states == {"sent"}:
            return jobs
        time.sleep(0.5)
    raise RuntimeError("not all series were handed over and delivered in time")


def examine(service: Service, jobs: list[dict[str, Any]], sent: dict[str, int]) -> tuple[Counter[str], set[str]]:
    """Return the number of jobs with all images of each series, and the UIDs of the objects of all jobs."""
    whole: Counter[str] = Counter()
    objects = set()
    for job in jobs:
        series, images = read_evidence(service, job)
        whole[series] += images == sent.get(series)
        objects |= {read_object(service, job, delivery["result"]).SOPInstanceUID for delivery in job["deliveries"]}
    return +whole, objects


def read_evidence(service: Service, job: dict[str, Any]) -> tuple[str, int]:
    """Return series and number of the source images in the report of a job. A failed job has none."""
    if job["state"] != "succeeded":
        return "", 0
    (study,) = read_object(service, job, "report.dcm").CurrentRequestedProcedureEvidenceSequence
    sources = [s for s in study.ReferencedSeriesSequence if len(s.ReferencedSOPSequence) > 1]
    return sources[0].SeriesInstanceUID, len(sources[0].ReferencedSOPSequence)


def read_object(service: Service, job: dict[str, Any], name: str) -> pydicom.Dataset:
    """Return a DICOM result of a job."""
    answer = httpx2.get(f"{service.processes['serve'].url}{URL}/{job['id']}/{name}", timeout=60)
    answer.raise_for_status()
    return pydicom.dcmread(BytesIO(answer.content))


if __name__ == "__main__":
    enter_namespace("tests.proofs.node")
    sys.exit(run_proof(prove, __doc__))
