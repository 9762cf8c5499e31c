"""Models, health, metrics, /docs, and the answer to an unexpected error."""

import re

import pytest
from fastapi.testclient import TestClient

from tests.api.support import BASE_URL, send


def test_models_are_listed_and_shown(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["models"]
    assert model["id"] == "tiny-0.0.1"
    shown = client.get(model["link"]).json()
    assert shown["manifest"]["name"] == "tiny"
    assert shown["card"] == "# tiny-0.0.1"
    assert client.get("/v1/models/none").json()["code"] == "not_found"


def test_health(client: TestClient) -> None:
    assert client.get("/livez").json() == {"status": "live"}
    ready = {"status": "ready", "provider": "cpu", "models": ["tiny-0.0.1"], "workers": 1}
    assert client.get("/readyz").json() == ready


def test_metrics_count_outcomes_without_job_ids(client: TestClient) -> None:
    job = send(client, name="counted").json()["id"]
    send(client, raise_error="OutOfDistribution")
    text = client.get("/metrics").text
    for line in (
        'counterpart_jobs_total{outcome="succeeded"} 1.0',
        'counterpart_jobs_total{outcome="out_of_distribution"} 1.0',
        'counterpart_stage_seconds_sum{stage="infer"} 2.0',
        "counterpart_queue_depth 0.0",
        "counterpart_queue_age_seconds 0.0",
        "counterpart_workers 1.0",
        'counterpart_model{model="tiny-0.0.1",provider="cpu"} 1.0',
    ):
        assert line in text
    assert job not in text


def test_docs_page_needs_no_other_server(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    assert "://" not in page.text
    for path in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert client.get(path).status_code == 200


def test_unexpected_error_is_a_problem_without_its_text(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = client.app.state.services.queue  # type: ignore[attr-defined]

    def fail(*_: object) -> None:
        raise RuntimeError("Zweistein")

    monkeypatch.setattr(queue, "list_jobs", fail)
    lenient = TestClient(client.app, BASE_URL, raise_server_exceptions=False)
    answer = lenient.get("/v1/scans")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert answer.headers["content-type"] == "application/problem+json"
    assert "Zweistein" not in answer.text

    monkeypatch.setattr(queue, "count_workers", fail)
    assert lenient.get("/readyz").json()["code"] == "not_ready"
