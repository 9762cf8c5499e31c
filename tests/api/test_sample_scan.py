"""The sample scan as a job."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.sample import make_sample
from tests.api.support import URL
from tests.support.bundle import tiny_manifest


def test_sample_becomes_a_job(client: TestClient, tmp_path: Path) -> None:
    manifest = tiny_manifest()
    assert (manifest.modality, manifest.sequence) == ("MR", "T1")
    sent = client.post(f"{URL}/sample")
    assert sent.status_code == 202
    job = sent.json()["id"]
    assert sent.headers["location"] == f"{URL}/{job}"
    assert sent.json()["model"] == manifest.name
    store = client.app.state.services.store  # type: ignore[attr-defined]
    assert store.scan_path(job).read_bytes() == make_sample(tmp_path).scan.read_bytes()
    assert [path.name for path in store.root.glob("tmp*")] == []


def test_missing_extra_is_explained(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.sample.find_spec", lambda _: None)
    refused = client.post(f"{URL}/sample")
    assert (refused.status_code, refused.json()["code"]) == (501, "missing_extra")
    assert "pip install" in refused.json()["advice"]
