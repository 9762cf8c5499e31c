"""A client that openapi-python-client generates from the running service sends a scan and fetches every result."""

import json
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app.api.results import RESULT_NAMES
from tests.api.service_process import CHECKOUT, RunningService, run_service
from tests.api.support import URL, WAIT
from tests.support.dicom import write_series, zip_files
from tests.support.phantom import brain, with_lesion

CLIENT = CHECKOUT / ".venv-client" / "bin"
SCRIPT = CHECKOUT / "tests" / "support" / "use_generated_client.py"
TOKEN = secrets.token_hex(32)
CLI = (sys.executable, "-m", "app.cli", "serve")


@pytest.fixture(scope="module")
def service(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    if not (CLIENT / "openapi-python-client").exists():
        pytest.skip("openapi-python-client is not installed in .venv-client (make client)")
    folder = tmp_path_factory.mktemp("service")
    with run_service(folder / "store", folder / "log", CLI, models=str(tiny_models), token=TOKEN) as service:
        service.http.headers["Authorization"] = f"Bearer {TOKEN}"
        yield service


@pytest.fixture(scope="module")
def client(service: RunningService, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generate the client with the configuration of docs/api.md, and return the folder that contains it."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "openapi.json").write_bytes(service.http.get("/openapi.json").content)
    (folder / "client.yaml").write_text(configuration())
    command: list[str | Path] = [
        CLIENT / "openapi-python-client",
        "generate",
        "--path",
        "openapi.json",
        "--config",
        "client.yaml",
    ]
    command += ["--meta", "none", "--output-path", "counterpart_client"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # The generator has no bodies of this type (POST /v1/scans, STOW-RS). Everything else must be in the client.
    lines = (done.stdout + done.stderr).splitlines()
    refused = [line for line in lines if line.startswith(("Unsupported", "Cannot", "ERROR"))]
    assert set(refused) == {"Unsupported content type multipart/related"}
    return folder


def configuration() -> str:
    """Return the configuration of the generator from docs/api.md."""
    page = (CHECKOUT / "docs" / "api.md").read_text()
    found = re.search(r"## Generated clients.*?```yaml\n(.*?)```", page, re.DOTALL)
    assert found
    return found[1]


def test_generated_client_fetches_every_result(service: RunningService, client: Path, tmp_path: Path) -> None:
    scan = zip_files(tmp_path / "scan.zip", write_series(tmp_path / "series", with_lesion(brain(), (25.0, 10.0, 20.0))))
    job = service.http.post(URL, files={"file": scan.read_bytes()}, headers=WAIT).json()
    direct = {name: service.http.get(f"{URL}/{job['id']}/{name}") for name in RESULT_NAMES}
    answers = use_client(service.http, client, scan, tmp_path / "out")
    assert answers["job"]["id"] == answers["same job"]["id"] == job["id"]
    assert answers["job"] == answers["shown"] == service_view(job)
    assert answers["listed"] == [job["id"]]
    assert answers["events"].startswith("retry: 2000")
    assert '"state":"succeeded"' in answers["events"]
    codes = [answers[name]["code"] for name in ("unknown job", "bad limit", "cancelled")]
    assert codes == ["not_found", "bad_request", "already_finished"]
    assert (answers["model"], answers["ready"], answers["erased"]) == ("tiny", "ready", None)
    assert "counterpart_" in answers["metrics"]
    kinds = dict.fromkeys(RESULT_NAMES, "File") | {"report.json": "Report", "brain.nii.gz": "no_brain_mask"}
    assert answers["results"] == kinds
    for name, answer in direct.items():
        if name == "report.json":
            assert json.loads((tmp_path / "out" / name).read_bytes()) == answer.json()
        elif kinds[name] == "File":
            assert (tmp_path / "out" / name).read_bytes() == answer.content
    assert service.http.get(f"{URL}/{job['id']}").status_code == 404


def use_client(http: httpx2.Client, client: Path, scan: Path, out: Path) -> dict[str, Any]:
    """Run the script in the environment of the generator, and return the answers that it got."""
    out.mkdir()
    environ = {"PYTHONPATH": str(client), "COUNTERPART_TOKEN": TOKEN}
    command: list[str | Path] = [CLIENT / "python", SCRIPT, str(http.base_url).rstrip("/"), scan, out]
    done = subprocess.run(command, cwd=client, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads((out / "answers.json").read_text())
    return answers


def service_view(job: dict[str, Any]) -> dict[str, Any]:
    """Return a job as the client writes it: times have another spelling of UTC."""
    spelled = {name: job[name].replace("Z", "+00:00") for name in ("created", "started", "ended")}
    return job | spelled
