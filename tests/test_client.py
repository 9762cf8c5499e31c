"""The Python client against a served process with a real bundle of tiny networks."""

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests

from app.client import Client, CounterpartProblem
from tests.api.service_process import run_service
from tests.support.dicom import write_series
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, with_lesion
from tests.support.results import save_nifti

TOKEN = "a-long-random-value"  # noqa: S105
COMMAND = (sys.executable, "-m", "app.cli", "serve")
SECONDS = 180


@pytest.fixture(scope="module")
def url(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    environ = {"COUNTERPART_TOKEN": TOKEN}
    with run_service(
        folder / "store", folder / "log", COMMAND, environ, models=str(tiny_models), threads="1", drain_seconds="0"
    ) as service:
        yield f"http://127.0.0.1:{service.port}"


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, TOKEN) as client:
        yield client


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nifti(tmp_path_factory.mktemp("scan") / "scan.nii.gz", with_lesion(brain(), LESION_MM, RADIUS_MM))


def test_scan_is_sent_and_its_results_are_read(client: Client, scan: Path, tmp_path: Path) -> None:
    job = client.wait(client.send(scan, model="tiny", seed=3), timeout=SECONDS)
    assert (job.state, client.send(scan.read_bytes(), model="tiny", seed=3).id) == ("succeeded", job.id)
    original = nib.load(scan)
    assert isinstance(original, nib.Nifti1Image)
    mask, image = client.image(job, "mask.nii.gz"), client.image(job.id, "image.nii.gz")
    assert set(np.unique(np.asarray(mask.dataobj))) == {0, 1}
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.asarray(original.dataobj))
    np.testing.assert_allclose(mask.affine, original.affine, atol=1e-4)
    report = client.report(job)
    assert report["lesion_volume_ml"] == job.document["lesion_volume_ml"] > 0
    assert client.result(job, "thumbnail.png").startswith(b"\x89PNG")
    client.save(job, "preview.png", tmp_path / "preview.png")
    assert (tmp_path / "preview.png").read_bytes() == client.result(job, "preview.png")

    client.review(job, 1, "wrong", note="Motion.", reader="A")
    assert client.get(job).document["reviews"] == {"right": 0, "wrong": 1, "unsure": 0}
    assert job.id in {other.id for other in client.jobs(state="succeeded", limit=1)}
    client.erase(job)
    assert job.id not in {other.id for other in client.jobs()}


def test_folder_of_dicom_files_is_sent_as_a_zip(client: Client, tmp_path: Path) -> None:
    write_series(tmp_path / "series", with_lesion(brain(), LESION_MM, RADIUS_MM))
    job = client.wait(client.send(tmp_path / "series", model="tiny"), timeout=SECONDS)
    assert client.result(job, "segmentation.dcm")[128:132] == b"DICM"
    with pytest.raises(CounterpartProblem) as problem:
        client.result(job, "brain.nii.gz")
    assert (problem.value.status, problem.value.code) == (404, "no_brain_mask")
    assert problem.value.advice


def test_refusal_has_its_code_and_advice(client: Client, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CounterpartProblem, match="not_an_image_format") as problem:
        client.send(b"not a scan" * 100)
    assert problem.value.status == 415
    with pytest.raises(CounterpartProblem, match="bad_request"):
        client.send(b"", mdoel="tiny")
    with pytest.raises(CounterpartProblem, match="unauthorised"):
        next(Client(url).jobs())
    monkeypatch.setenv("COUNTERPART_TOKEN", TOKEN)
    list(Client(url).jobs())


def test_netrc_does_not_replace_the_token(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    list(Client(url, TOKEN).jobs())


def test_failed_job_raises(client: Client, tmp_path: Path, scan: Path) -> None:
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(scan.read_bytes()[:-2000])
    with pytest.raises(CounterpartProblem, match="truncated_file"):
        client.wait(client.send(cut, model="tiny"), timeout=SECONDS)


class BusyService(BaseHTTPRequestHandler):
    """Answers 429 twice, then 502 of a proxy, then a job that never ends."""

    calls: list[bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.calls.append(body)
        if len(self.calls) <= 2:
            self.answer(
                429, {"code": "queue_full", "status": 429, "title": "", "found": "", "expected": "", "advice": ""}
            )
        else:
            self.answer(202, {"id": "x", "state": "queued", "problem": None})

    def do_GET(self) -> None:
        status = 502 if self.path.endswith("/y") else 200
        state = "cancelled" if self.path.endswith("/z") else "queued"
        self.answer(status, {"id": "x", "state": state, "problem": None})

    def answer(self, status: int, document: dict[str, Any]) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/problem+json" if status == 429 else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Retry-After", "1" if status == 429 else "60")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Write nothing."""


@pytest.fixture
def busy() -> Iterator[HTTPServer]:
    BusyService.calls = []
    with HTTPServer(("127.0.0.1", 0), BusyService) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_busy_service_is_tried_again_with_the_whole_scan(busy: HTTPServer, scan: Path) -> None:
    with Client(f"http://127.0.0.1:{busy.server_port}/prefix/") as client:
        job = client.send(scan)
        assert BusyService.calls == [scan.read_bytes()] * 3
        with pytest.raises(TimeoutError):
            client.wait(job, timeout=0.3)
        with pytest.raises(CounterpartProblem, match="http_502"):
            client.get("y")
        with pytest.raises(CounterpartProblem, match="cancelled"):
            client.wait("z")
    BusyService.calls.clear()
    with Client(f"http://127.0.0.1:{busy.server_port}", patience=0) as client:
        with pytest.raises(CounterpartProblem, match="queue_full"):
            client.send(b"scan")
        assert len(BusyService.calls) == 1


def test_file_that_ends_early_leaves_the_path_as_it_was(tmp_path: Path) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = b"complete" if "whole" in self.path else b"comp"
            self.send_response(200)
            self.send_header("Content-Length", "8")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    path = tmp_path / "mask.nii.gz"
    path.write_bytes(b"earlier")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with Client(f"http://127.0.0.1:{server.server_port}") as client:
            with pytest.raises(requests.RequestException):
                client.save("job", "half", path)
            assert path.read_bytes() == b"earlier"
            client.save("job", "whole", path)
        server.shutdown()
        thread.join()
    assert path.read_bytes() == b"complete"
    assert list(tmp_path.iterdir()) == [path]
