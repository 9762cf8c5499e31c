"""Services with settings of their own: DBOS knows one service in a process, so none here shares it with another."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.errors import DamagedBundle
from app.main import create_app
from app.settings import Settings
from tests.api.support import FakeEngine, fake_scan

TOKEN = "a-long-random-value"  # noqa: S105


def test_not_ready_names_the_broken_part(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.broken = DamagedBundle("tiny/encoder.onnx is missing.", expected="it.", advice="Install it again.")
    with TestClient(create_app(Settings(store=str(tmp_path), drain_seconds=0), engine)) as client:
        answer = client.get("/readyz")
        assert client.get("/livez").status_code == 200
        # Better refused at the door than accepted and failed.
        assert client.post("/v1/scans", content=fake_scan()).json() == answer.json()
    assert answer.status_code == 503
    assert answer.json()["found"] == "tiny/encoder.onnx is missing."


@pytest.mark.parametrize(("header", "status"), [({}, 401), ({"Authorization": "Bearer no"}, 401), (None, 200)])
def test_with_a_token_the_door_is_locked(tmp_path: Path, header: dict[str, str] | None, status: int) -> None:
    shown = {"Authorization": f"Bearer {TOKEN}"} if header is None else header
    settings = Settings(store=str(tmp_path), token=TOKEN, drain_seconds=0)
    with TestClient(create_app(settings, FakeEngine()), headers=shown) as client:
        for path in ("/v1/scans", "/v1/models", "/metrics"):
            answer = client.get(path)
            assert answer.status_code == status
            if status == 401:
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["code"] == "unauthorised"
        assert client.post("/v1/scans", content=b"").status_code == (400 if status == 200 else 401)
        assert client.get("/livez").status_code == 200
        assert client.get("/docs").status_code == 200
