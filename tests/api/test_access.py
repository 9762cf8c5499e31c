"""Services with other settings: broken models, a token, a stop, and a prefix.

DBOS allows one service in a process at a time.
"""

import threading
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.errors import DamagedBundle
from app.main import create_app
from app.settings import Settings
from tests.api.support import BASE_URL, URL, WAIT, FakeEngine, fake_scan

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


def test_stopping_service_answers_waiting_callers(tmp_path: Path) -> None:
    settings = Settings(store=str(tmp_path), drain_seconds=0)
    with TestClient(create_app(settings, FakeEngine()), BASE_URL) as client:
        services = client.app.state.services  # type: ignore[attr-defined]
        answers = []
        post = lambda: answers.append(client.post(URL, content=fake_scan(seconds=60), headers=WAIT))  # noqa: E731
        thread = threading.Thread(target=post)
        thread.start()
        while not services.follower._subscriptions:
            time.sleep(0.02)
        client.portal.call(services.stop)  # type: ignore[union-attr]
        thread.join(30)
        (answer,) = answers
        assert answer.status_code == 202
        assert client.get(answer.headers["location"]).status_code == 200
        late = client.post(URL, content=fake_scan(name="late"))
        assert (late.status_code, late.json()["code"]) == (503, "not_ready")


def test_prefix_of_a_proxy_is_in_every_link(tmp_path: Path) -> None:
    settings = Settings(store=str(tmp_path), drain_seconds=0, root_path="/counterpart/")
    with TestClient(create_app(settings, FakeEngine()), BASE_URL) as client:
        answer = client.post(URL, content=fake_scan(), headers=WAIT)
        job = answer.json()
        links = [answer.headers["location"], *job["links"].values()]
        client.post(URL, content=fake_scan(name="second"), headers=WAIT)
        links += [client.get(f"{URL}?limit=1").json()["next"]]
        links += [model["link"] for model in client.get("/v1/models").json()["models"]]
        for link in links:
            assert link.startswith("/counterpart/v1/")
            # A proxy may keep the prefix or remove it.
            assert client.get(link).status_code == client.get(link.removeprefix("/counterpart")).status_code == 200
        assert "/counterpart/openapi.json" in client.get("/docs").text
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/counterpart"}]
