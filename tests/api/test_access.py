"""Services with other settings: broken models, and a token. DBOS allows one service in a process at a time."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.errors import DamagedBundle
from app.main import create_app
from app.settings import Settings
from tests.api.support import BASE_URL, URL, FakeEngine, fake_scan

TOKEN = "a-long-random-value"  # noqa: S105


def test_service_with_a_broken_model_is_not_ready_and_refuses_scans(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.warm_up_error = DamagedBundle("tiny/encoder.onnx is missing.", expected="it.", advice="Install it again.")
    with TestClient(create_app(Settings(store=str(tmp_path), drain_seconds=0), engine), BASE_URL) as client:
        answer = client.get("/readyz")
        assert client.get("/livez").status_code == 200
        assert client.post(URL, content=fake_scan()).json() == answer.json()
    assert answer.status_code == 503
    assert answer.json()["found"] == "tiny/encoder.onnx is missing."


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"Authorization": "Bearer no"}, 401), ({"Authorization": f"Bearer {TOKEN}"}, 200)],
)
def test_token_is_required(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    settings = Settings(store=str(tmp_path), token=TOKEN, drain_seconds=0)
    with TestClient(create_app(settings, FakeEngine()), BASE_URL, headers=headers) as client:
        for path in (URL, "/v1/models", "/metrics"):
            answer = client.get(path)
            assert answer.status_code == status
            if status == 401:
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["code"] == "unauthorised"
        assert client.post(URL, content=b"").status_code == (400 if status == 200 else 401)
        for path in ("/livez", "/docs"):
            assert client.get(path).status_code == 200
