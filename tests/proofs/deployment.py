"""Deployments of the service on loopback for the proofs, with the tests' tiny bundle and phantoms."""

# a proof prints its table

import argparse
import hashlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import httpx2
import nibabel as nib

from app.jobs.job import ENDED_STATES
from tests.support.bundle import write_tiny_bundle
from tests.support.phantom import brain, grid
from tests.support.servers import free_port

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = ("mask.nii.gz", "labels.nii.gz", "anomaly.nii.gz", "counterpart.nii.gz", "preview.png")
URL = "/v1/scans"
READY_SECONDS = 600


@dataclass
class ServiceProcess:
    """One process of the service."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Base URL of the process."""
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        """Wait until the process reports that it is ready."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the process exited with {self.process.returncode}: see its log")
            try:
                if httpx2.get(f"{self.url}/readyz", timeout=10).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.05)
        raise RuntimeError("the process is not ready: see its log")

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        self.process.kill()
        self.process.wait()


@dataclass
class Deployment:
    """All processes of one deployment.

    Attributes
    ----------
    folder : Path
        Folder of the stores, the bundle and the log.
    environ : mapping
        Environment variables of all processes.
    checkout : Path
        Source tree of the version that runs.
    """

    folder: Path
    environ: Mapping[str, str]
    checkout: Path
    processes: list[ServiceProcess] = field(default_factory=list)

    def start(self, *arguments: str, **settings: str) -> ServiceProcess:
        """Start `counterpart ARGUMENTS` on a free port."""
        port = free_port()
        environ = {**os.environ, "PYTHONPATH": str(self.checkout), **self.environ, **as_environ(settings)}
        command = [sys.executable, "-c", "from app.cli import main; main()", *arguments, "--port", str(port)]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, cwd=self.checkout, env=environ, stdout=log, stderr=log)
        self.processes.append(ServiceProcess(port, process))
        return self.processes[-1]

    def stop(self) -> None:
        """Stop all processes that still run."""
        for service in self.processes:
            service.process.terminate()
        for service in self.processes:
            try:
                service.process.wait(60)
            except subprocess.TimeoutExpired:
                service.kill()


@contextmanager
def deploy(folder: Path, checkout: str = str(CHECKOUT), **settings: str) -> Iterator[Deployment]:
    """Yield a deployment in a folder, by default with the tiny bundle, and stop its processes at the end.

    Parameters
    ----------
    checkout : str
        Source tree of the version that runs.
    **settings : str
        Settings in lower case without their prefix, and variables that begin with AWS_.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = folder / "models"
    if not models.is_dir() and "models" not in settings:
        models.mkdir()
        write_tiny_bundle(models)
    defaults = {"models": str(models), "threads": "1", "store": str(folder / "store")}
    deployment = Deployment(folder, as_environ({**defaults, **settings}), Path(checkout))
    try:
        yield deployment
    finally:
        deployment.stop()


def as_environ(settings: Mapping[str, str]) -> dict[str, str]:
    """Return settings as environment variables."""
    return {
        name if name.startswith("AWS_") else f"COUNTERPART_{name.upper()}": value for name, value in settings.items()
    }


def make_scans(folder: Path, count: int) -> list[bytes]:
    """Return small heads at different positions, each about a hundred kilobytes as NIfTI."""
    folder.mkdir(parents=True, exist_ok=True)
    scans = []
    for index in range(count):
        head = brain(affine=grid(), centre_mm=(index * 0.1, 0.0, 0.0))
        path = folder / f"{index}.nii.gz"
        nib.save(nib.Nifti1Image(head.array, head.affine), path)
        scans.append(path.read_bytes())
    return scans


def submit(client: httpx2.Client, scan: bytes, key: str, deadline: float) -> str:
    """Submit a scan until it is accepted. Repeat after 429, 503 or no answer, as a client should."""
    while time.monotonic() < deadline:
        try:
            answer = client.post(URL, content=scan, headers={"Idempotency-Key": key})
        except httpx2.TransportError:
            time.sleep(0.1)
            continue
        if answer.status_code == 202:
            return str(answer.json()["id"])
        if answer.status_code not in {429, 503}:
            raise RuntimeError(f"{answer.status_code}: {answer.text}")
        time.sleep(0.5)
    raise RuntimeError("the scan was not accepted in time")


def wait_until_ended(client: httpx2.Client, job: str, deadline: float) -> dict[str, Any]:
    """Return a job when it has ended."""
    while time.monotonic() < deadline:
        try:
            found: dict[str, Any] = client.get(f"{URL}/{job}").json()
        except httpx2.TransportError:
            found = {}
        if found.get("state") in ENDED_STATES:
            return found
        time.sleep(0.2)
    raise RuntimeError(f"{job} did not end in time: {found}")


def outcome(job: Mapping[str, Any]) -> str:
    """Return the error code of an ended job, or its state if it has no problem."""
    return str((job["problem"] or {"code": job["state"]})["code"])


def results_digest(client: httpx2.Client, job: str, names: Iterable[str] = RESULTS) -> dict[str, str]:
    """Return the hashes of the published results of a job, and of each part of its report without the timings."""
    digest = {}
    for name in names:
        answer = client.get(f"{URL}/{job}/{name}")
        answer.raise_for_status()
        digest[name] = hashlib.sha256(answer.content).hexdigest()
    report = client.get(f"{URL}/{job}/report.json").json()
    del report["work"]["seconds"]
    parts = {f"report.json, {key}": json.dumps(value, sort_keys=True) for key, value in report.items()}
    return digest | {key: hashlib.sha256(text.encode()).hexdigest() for key, text in parts.items()}


def differing_parts(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Return the names of the results, and the parts of the report, that differ."""
    return sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))


def list_job_ids(client: httpx2.Client) -> list[str]:
    """Return the ids of all jobs, page by page."""
    ids, path = [], f"{URL}?limit=200"
    while path:
        page = client.get(path).json()
        ids += [job["id"] for job in page["scans"]]
        path = page["next"]
    return ids


def reference_digests(folder: Path, scans: list[bytes]) -> list[dict[str, str]]:
    """Return the digest of each scan's results from an undisturbed run."""
    with deploy(folder) as deployment:
        service = deployment.start("serve")
        service.wait_until_ready()
        deadline = time.monotonic() + 600
        with httpx2.Client(base_url=service.url, timeout=60) as client:
            jobs = [submit(client, scan, f"reference-{index}", deadline) for index, scan in enumerate(scans)]
            for job in jobs:
                assert wait_until_ended(client, job, deadline)["state"] == "succeeded"
            return [results_digest(client, job) for job in jobs]


def print_row(label: str, text: object) -> None:
    """Print one row of a proof's table."""
    print(f"{label:20s}{text}", flush=True)


def run_proof(prove: Callable[..., bool], description: str | None) -> int:
    """Run a proof in a temporary folder and return its exit status: 0 if it holds, else 1.

    Parameters
    ----------
    prove : callable
        Takes the folder. Each of its keyword arguments, with its default, is an option of the command line.
    description : str or None
        Text for --help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, parameter in list(inspect.signature(prove).parameters.items())[1:]:
        if parameter.default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            choices = get_args(parameter.annotation) or None
            default = parameter.default
            parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices)
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="counterpart-proof-") as folder:
        holds = prove(Path(folder), **options)
    print("PASSED" if holds else "FAILED")
    return 0 if holds else 1
