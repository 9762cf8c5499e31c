"""Processes of the service on loopback, with the tests' synthetic bundle and phantoms, for the proofs."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import nibabel as nib

from scripts.servers import free_port
from tests.support.bundle import write_tiny_bundle
from tests.support.phantom import brain, grid

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = ("mask.nii.gz", "anomaly.nii.gz", "counterpart.nii.gz", "preview.png")
URL = "/v1/scans"
READY_SECONDS = 600
ENDED = {"succeeded", "failed", "cancelled"}


@dataclass
class Node:
    """One process of the service."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def base(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> float:
        """Seconds until it answered that it is ready."""
        start = time.monotonic()
        while time.monotonic() - start < READY_SECONDS:
            if self.process.poll() is not None:
                raise RuntimeError(f"it ended with {self.process.returncode}: see its log")
            try:
                if httpx2.get(f"{self.base}/readyz", timeout=10).status_code == 200:
                    return time.monotonic() - start
            except httpx2.TransportError:
                pass
            time.sleep(0.05)
        raise RuntimeError("never ready: see its log")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()


@dataclass
class Fleet:
    """All processes of one deployment.

    Attributes
    ----------
    folder : Path
        Stores, bundle and logs.
    environ : mapping
        Settings that all share.
    checkout : Path
        The version that is run.
    """

    folder: Path
    environ: Mapping[str, str]
    nodes: list[Node] = field(default_factory=list)
    checkout: Path = CHECKOUT

    def start(self, *words: str, **settings: str) -> Node:
        """Start `counterpart WORDS` on a free port."""
        port = free_port()
        environ = {**os.environ, "PYTHONPATH": str(self.checkout), **self.environ}
        environ |= {f"COUNTERPART_{name.upper()}": value for name, value in settings.items()}
        command = [sys.executable, "-c", "from app.cli import main; main()", *words, "--port", str(port)]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, cwd=self.checkout, env=environ, stdout=log, stderr=log)
        node = Node(port, process)
        self.nodes.append(node)
        return node

    def end(self) -> None:
        """End what still runs."""
        for node in self.nodes:
            node.process.terminate()
        for node in self.nodes:
            try:
                node.process.wait(60)
            except subprocess.TimeoutExpired:
                node.kill()


@contextmanager
def fleet(folder: Path, checkout: str = str(CHECKOUT), **settings: str) -> Iterator[Fleet]:
    """A deployment in a folder, with the synthetic bundle; all its processes end with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    models = folder / "models"
    if not models.is_dir() and "models" not in settings:
        models.mkdir()
        write_tiny_bundle(models)
    environ = {
        "COUNTERPART_MODELS": str(models),
        "COUNTERPART_THREADS": "1",
        "COUNTERPART_STORE": str(folder / "store"),
    }
    environ |= {name if name.startswith("AWS_") else f"COUNTERPART_{name.upper()}": v for name, v in settings.items()}
    made = Fleet(folder, environ, checkout=Path(checkout))
    try:
        yield made
    finally:
        made.end()


def make_scans(folder: Path, count: int) -> list[bytes]:
    """Small heads, each of another place: about a hundred kilobytes as NIfTI."""
    folder.mkdir(parents=True, exist_ok=True)
    scans = []
    for index in range(count):
        head = brain(affine=grid(), centre_mm=(index * 0.1, 0.0, 0.0))
        path = folder / f"{index}.nii.gz"
        nib.save(nib.Nifti1Image(head.array, head.affine), path)
        scans.append(path.read_bytes())
    return scans


def post(client: httpx2.Client, scan: bytes, key: str, deadline: float) -> str:
    """Send a scan until it is accepted, as a client should: again after 429 or 503, and where nobody answers."""
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
    raise RuntimeError("never accepted")


def follow(client: httpx2.Client, job: str, deadline: float) -> dict[str, Any]:
    """A job when it has ended."""
    while time.monotonic() < deadline:
        try:
            found: dict[str, Any] = client.get(f"{URL}/{job}").json()
        except httpx2.TransportError:
            found = {}
        if found.get("state") in ENDED:
            return found
        time.sleep(0.2)
    raise RuntimeError(f"{job} never ended: {found}")


def digest(client: httpx2.Client, job: str) -> str:
    """Hash of all that was published for a job, without how long it took."""
    whole = hashlib.sha256()
    for name in RESULTS:
        answer = client.get(f"{URL}/{job}/{name}")
        answer.raise_for_status()
        whole.update(answer.content)
    report = client.get(f"{URL}/{job}/report.json").json()
    del report["work"]["seconds"]
    whole.update(json.dumps(report, sort_keys=True).encode())
    return whole.hexdigest()


def every_job(client: httpx2.Client) -> list[str]:
    """Ids of all jobs, page by page."""
    ids, path = [], f"{URL}?limit=200"
    while path:
        page = client.get(path).json()
        ids += [job["id"] for job in page["scans"]]
        path = page["next"]
    return ids


def undisturbed(folder: Path, scans: list[bytes]) -> list[str]:
    """Digest of each scan's results where nothing happens meanwhile."""
    with fleet(folder) as calm:
        node = calm.start("serve")
        node.wait_until_ready()
        deadline = time.monotonic() + 600
        with httpx2.Client(base_url=node.base, timeout=60) as client:
            jobs = [post(client, scan, f"calm-{index}", deadline) for index, scan in enumerate(scans)]
            for job in jobs:
                assert follow(client, job, deadline)["state"] == "succeeded"
            return [digest(client, job) for job in jobs]
