#!/usr/bin/env python3
"""DICOMweb between Orthanc and a served process, in both directions.

    python -m tests.proofs.orthanc_dicomweb SERIES [--models FOLDER]

1. Orthanc pushes a series to the service (its STOW-RS client). The series becomes a job.
2. Orthanc retrieves the study from the service (its WADO-RS client), and then has the results.
3. The service pulls the series from Orthanc (`POST /v1/scans` with JSON). It is the same scan.

The script prints one JSON line. It exits with 3 if a program is not installed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pydicom

from tests.api.service_process import RunningService, run_service
from tests.proofs.orthanc_round_trip import (
    NAMESPACE_VARIABLE,
    NOT_INSTALLED,
    PLUGIN,
    enter_namespace,
    indexed,
    orthanc,
    raise_loopback,
    request,
    send_stow,
)
from tests.support.servers import free_port

SERVE = (sys.executable, "-m", "app.cli", "serve")
ORTHANC_URL = "http://127.0.0.1:8042/dicom-web"


def main() -> int:
    """Run the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", type=Path, help="folder of a DICOM series")
    parser.add_argument("--models", type=Path, help="folder of model bundles")
    arguments = parser.parse_args()
    if not PLUGIN.is_file():
        print(f"not installed: {PLUGIN} (Debian: orthanc, orthanc-dicomweb)")
        return NOT_INSTALLED
    if not os.environ.get(NAMESPACE_VARIABLE):
        enter_namespace()
    raise_loopback()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(exchange(Path(name), arguments.series, arguments.models)))
    return 0


def exchange(folder: Path, series: Path, models: Path | None) -> dict[str, Any]:
    """Run the three steps and return what was found."""
    (folder / "sources.toml").write_text(f'[sources.pacs]\nurl = "{ORTHANC_URL}"\n')
    settings = {"sources": str(folder / "sources.toml")} | ({"models": str(models)} if models else {})
    port = free_port()
    server = {"Url": f"http://127.0.0.1:{port}/dicomweb/", "HasDelete": False}
    files = sorted(path for path in series.iterdir() if path.is_file())
    first = pydicom.dcmread(files[0], stop_before_pixels=True)
    (folder / "orthanc").mkdir()
    with (
        orthanc(folder / "orthanc", {"counterpart": server}),
        run_service(folder / "store", folder / "log", SERVE, {}, port=str(port), **settings) as service,
    ):
        send_stow(files)
        pushed = push(service)
        pulled = pull(service, first)
        before = indexed()["series"]
        retrieve(first.StudyInstanceUID)
        return {
            "instances": len(files),
            "pushed": service.http.get(f"/v1/scans/{pushed}").json()["state"],
            "jobs": len(service.http.get("/v1/scans").json()["scans"]),
            "pulled": service.http.get(f"/v1/scans/{pulled}").json()["state"],
            "series before": before,
            "series after": indexed()["series"],
        }


def push(service: RunningService) -> str:
    """Let Orthanc send all its series to the service, and return the job."""
    resources = json.loads(request("/series")[0])
    body = json.dumps({"Resources": resources, "Synchronous": True}).encode()
    request("/dicom-web/servers/counterpart/stow", body)
    (job,) = service.http.get("/v1/scans").json()["scans"]
    return wait(service, job["id"])


def pull(service: RunningService, first: pydicom.Dataset) -> str:
    """Let the service retrieve the series from Orthanc, and return the job."""
    wanted = {"source": "pacs", "study": first.StudyInstanceUID, "series": first.SeriesInstanceUID}
    answer = service.http.post("/v1/scans", json=wanted)
    if answer.status_code != 202:
        raise SystemExit(answer.text)
    return wait(service, answer.json()["id"])


def wait(service: RunningService, job: str) -> str:
    """Wait until a job has succeeded."""
    while (shown := service.http.get(f"/v1/scans/{job}").json())["state"] in {"queued", "running"}:
        time.sleep(0.2)
    if shown["state"] != "succeeded":
        raise SystemExit(f"FAILED: expected a job that succeeded, found {shown['state']}: {shown['problem']}")
    return job


def retrieve(study: str) -> None:
    """Let Orthanc retrieve a study from the service."""
    body = json.dumps({"Resources": [{"Study": str(study)}], "Synchronous": True}).encode()
    request("/dicom-web/servers/counterpart/retrieve", body)


if __name__ == "__main__":
    sys.exit(main())
