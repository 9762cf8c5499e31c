import re

import pytest
from fastapi.testclient import TestClient

from tests.api.support import fake_scan


def test_models_are_listed_and_shown(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["models"]
    assert model["id"] == "tiny-0.0.1"
    shown = client.get(model["link"]).json()
    assert shown["manifest"]["name"] == "tiny"
    assert shown["card"] == "# tiny-0.0.1"
    assert client.get("/v1/models/none").json()["code"] == "not_found"


def test_health(client: TestClient) -> None:
    assert client.get("/livez").json() == {"status": "live"}
    assert client.get("/readyz").json() == {
        "status": "ready",
        "provider": "cpu",
        "models": ["tiny-0.0.1"],
        "workers": 1,
    }


def test_metrics_count_outcomes_and_name_nobody(client: TestClient) -> None:
    job = client.post("/v1/scans", content=fake_scan(name="counted"), headers={"Prefer": "wait=120"}).json()["id"]
    client.post("/v1/scans", content=fake_scan(fail="OutOfDistribution"), headers={"Prefer": "wait=120"})
    text = client.get("/metrics").text
    assert 'counterpart_jobs_total{outcome="succeeded"} 1.0' in text
    assert 'counterpart_jobs_total{outcome="out_of_distribution"} 1.0' in text
    assert 'counterpart_stage_seconds_sum{stage="infer"} 2.0' in text
    assert "counterpart_queue_depth 0.0" in text
    assert "counterpart_queue_age_seconds 0.0" in text
    assert "counterpart_workers 1.0" in text
    assert 'counterpart_model{model="tiny-0.0.1",provider="cpu"} 1.0' in text
    assert job not in text


def test_the_document_describes_every_route(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/scans",
        "/v1/scans/{job}",
        "/v1/scans/{job}/cancel",
        "/v1/scans/{job}/events",
        "/v1/scans/{job}/{name}",
        "/v1/models",
        "/v1/models/{model}",
        "/livez",
        "/readyz",
        "/metrics",
    }
    upload = document["paths"]["/v1/scans"]["post"]
    assert set(upload["requestBody"]["content"]) >= {"application/octet-stream", "multipart/form-data"}
    assert set(upload["responses"]) == {
        "200",
        "202",
        "400",
        "401",
        "403",
        "409",
        "413",
        "415",
        "422",
        "429",
        "500",
        "503",
        "507",
    }
    assert "Problem" in document["components"]["schemas"]


def test_the_documents_page_needs_no_other_server(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    assert "://" not in page.text
    for path in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert client.get(path).status_code == 200


def test_a_fault_of_the_service_is_a_problem_without_its_text(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]

    def fail(*_: object) -> None:
        raise RuntimeError("Zweistein")

    monkeypatch.setattr(service.jobs, "page", fail)
    quiet = TestClient(client.app, raise_server_exceptions=False)
    answer = quiet.get("/v1/scans")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "internal_error"
    assert "Zweistein" not in answer.text

    monkeypatch.setattr(service.jobs, "workers", fail)
    assert quiet.get("/readyz").json()["code"] == "not_ready"
