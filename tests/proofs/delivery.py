"""Proof: every DICOM result of a scan reaches Orthanc by C-STORE and by STOW-RS, through routes, unchanged.

    python -m tests.proofs.delivery

A series is sent over HTTP. One route sends all DICOM results to an Orthanc by C-STORE, one to a second Orthanc by
STOW-RS, and one to dcmtk's storescp. Each stored object is compared with the result of the job, what dcmtk's findscu
finds at Orthanc with the results, and the audit trail with the deliveries.

All programs run in a network namespace with only the loopback device.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import httpx2
import pydicom

from app.client import Client
from app.export.outputs import DICOM_NAMES
from tests.proofs.deployment import URL, ServiceProcess, deploy, print_row, run_proof
from tests.support.dicom import Series, write_series
from tests.support.pacs import TITLE, Orthanc, enter_namespace, orthanc
from tests.support.phantom import LESION_MM, brain, grid, with_lesion
from tests.support.servers import free_port

TIMEOUT_SECONDS = 300
SHAPE, SPACING = (40, 48, 36), 4.0
ROUTES = """
[targets.dimse]
kind = "dimse"
host = "127.0.0.1"
port = {port}
ae_title = "{title}"

[targets.archive]
kind = "dimse"
host = "127.0.0.1"
port = {archive}
ae_title = "{title}"

[targets.web]
kind = "stow"
url = "{url}/dicom-web"

[[routes]]
target = "dimse"
results = {names}

[[routes]]
target = "web"
results = {names}

[[routes]]
target = "archive"
results = {names}
"""


def prove(folder: Path) -> bool:
    """Run the proof, print its table and return whether it holds."""
    series = write_series(folder / "series", with_lesion(brain(SHAPE, grid(SHAPE, SPACING)), LESION_MM), Series())
    with (
        orthanc(folder / "dimse", DicomAlwaysAllowFind=True) as dimse,
        orthanc(folder / "web") as web,
        storescp(folder / "archive") as archive,
    ):
        routes = ROUTES.format(
            port=dimse.dicom_port, archive=archive, title=TITLE, url=web.url, names=json.dumps(DICOM_NAMES)
        )
        (folder / "routes.toml").write_text(routes)
        with deploy(folder / "deployment", routes=str(folder / "routes.toml")) as deployment:
            service = deployment.start("serve")
            service.wait_until_ready()
            results = deliver(service, series[0].parent)
            stored = {name: fetch_stored(pacs) for name, pacs in (("dimse", dimse), ("web", web))}
            stored["archive"] = [pydicom.dcmread(path) for path in (folder / "archive").iterdir()]
            found = find(folder / "found", dimse.dicom_port, results[0].StudyInstanceUID)
            trail = httpx2.get(f"{service.url}/v1/audit", timeout=60).text
    rows = [json.loads(line) for line in trail.splitlines()]
    outcomes = Counter((row["outcome"], row["address"]) for row in rows if row["action"] == "deliver")
    addresses = [f"127.0.0.1:{port}" for port in (dimse.dicom_port, web.http_port, archive)]
    for name, objects in stored.items():
        print_row(name, ", ".join(sorted(str(dataset.SOPClassUID.name) for dataset in objects)))
    print_row("findscu", ", ".join(sorted(dataset.Modality for dataset in found)))
    print_row("audit trail", {outcome: number for (outcome, _), number in outcomes.items()})
    expected = Counter({(outcome, at): len(DICOM_NAMES) for outcome in ("begun", "sent") for at in addresses})
    is_complete = all(sort(objects) == results for objects in stored.values())
    is_found = {dataset.SeriesInstanceUID for dataset in found} == {dataset.SeriesInstanceUID for dataset in results}
    return is_complete and is_found and len(results) == len(DICOM_NAMES) and outcomes == expected


@contextmanager
def storescp(folder: Path) -> Iterator[int]:
    """Start dcmtk's storescp, which writes what it receives into a folder, and yield its port."""
    folder.mkdir()
    port = free_port()
    process = subprocess.Popen(["storescp", "--aetitle", TITLE, "--output-directory", folder, str(port)])
    try:
        yield port
    finally:
        process.terminate()
        process.wait(30)


def find(folder: Path, port: int, study: str) -> list[pydicom.Dataset]:
    """Return the series of a study that dcmtk's findscu finds at an Orthanc."""
    folder.mkdir()
    keys = ("QueryRetrieveLevel=SERIES", f"StudyInstanceUID={study}", "SeriesInstanceUID", "Modality")
    options = [option for key in keys for option in ("-k", key)]
    command = ["findscu", "-S", "-X", "-od", str(folder), "-aec", TITLE, *options, "127.0.0.1", str(port)]
    subprocess.run(command, check=True)
    return [pydicom.dcmread(path) for path in folder.iterdir()]


def deliver(service: ServiceProcess, series: Path) -> list[pydicom.Dataset]:
    """Send a series, wait until its results are delivered, and return them."""
    client = Client(service.url)
    job = client.wait(client.send(series), timeout=TIMEOUT_SECONDS)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    with httpx2.Client(base_url=service.url, timeout=60) as http:
        while time.monotonic() < deadline:
            deliveries = http.get(f"{URL}/{job.id}").json()["deliveries"]
            if all(delivery["state"] == "sent" for delivery in deliveries):
                break
            time.sleep(0.2)
        return sort(pydicom.dcmread(BytesIO(http.get(f"{URL}/{job.id}/{name}").content)) for name in DICOM_NAMES)


def fetch_stored(pacs: Orthanc) -> list[pydicom.Dataset]:
    """Return the objects that Orthanc has stored."""
    with httpx2.Client(base_url=pacs.url, timeout=60) as http:
        files = [http.get(f"/instances/{instance['id']}/file").content for instance in pacs.instances()]
    return [pydicom.dcmread(BytesIO(file)) for file in files]


def sort(datasets: Iterable[pydicom.Dataset]) -> list[pydicom.Dataset]:
    """Return data sets in the order of their UIDs."""
    return sorted(datasets, key=lambda dataset: str(dataset.SOPInstanceUID))


if __name__ == "__main__":
    enter_namespace("tests.proofs.delivery")
    sys.exit(run_proof(prove, __doc__))
