"""Deliveries in the description of a job, and the call that tries them again."""

from pathlib import Path

from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.api.support import BASE_URL, URL, FakeEngine, send

ROUTES = """
[targets.archive]
kind = "dimse"
host = "127.0.0.1"
port = 1
ae_title = "ARCHIVE"

[[routes]]
target = "archive"
results = ["report.dcm"]
"""


def test_a_job_shows_its_deliveries_and_tries_them_again(tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text(ROUTES)
    app = create_app(Settings(store=str(tmp_path / "store"), routes=tmp_path / "routes.toml"), FakeEngine())
    with TestClient(app, base_url=BASE_URL) as http:
        job = send(http).json()
        assert job["deliveries"] == []  # the scan is no DICOM series
        deliveries = app.state.services.queue.deliveries
        deliveries.plan(job["id"], [("archive", "report.dcm")])
        while (shown := http.get(f"{URL}/{job['id']}").json()["deliveries"])[0]["state"] == "pending":
            pass
        assert {key: shown[0][key] for key in ("target", "result", "state", "code", "next_try")} == {
            "target": "archive",
            "result": "report.dcm",
            "state": "failed",
            "code": "no_such_result",
            "next_try": None,
        }
        answer = http.post(f"{URL}/{job['id']}/deliveries/retry")
        assert answer.status_code == 200
        assert answer.json()["deliveries"][0]["state"] in {"pending", "failed"}
        assert http.post(f"{URL}/{'0' * 16}-{'0' * 16}/deliveries/retry").status_code == 404
