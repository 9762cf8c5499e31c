"""STOW-RS with a fake engine: the URLs of the answer, and a store that hangs."""

import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from app.ingest.dicom.instances import identify
from app.main import create_app
from app.settings import Settings
from tests.api.support import BASE_URL, URL, FakeEngine
from tests.support.dicom import make_datasets
from tests.support.phantom import brain

PUBLIC_URL = "https://reader.example/counterpart/"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(store=str(tmp_path / "store"), drain_seconds=0, public_url=PUBLIC_URL)
    with TestClient(create_app(settings, FakeEngine(), worker=False), BASE_URL) as client:
        yield client


def store_instance(client: TestClient) -> httpx2.Response:
    buffer = BytesIO()
    make_datasets(brain())[0].save_as(buffer, enforce_file_format=True)
    content = b"\r\n--part\r\nContent-Type: application/dicom\r\n\r\n" + buffer.getvalue() + b"\r\n--part--\r\n"
    kind = 'multipart/related; type="application/dicom"; boundary=part'
    return client.post("/dicomweb/studies", content=content, headers={"Content-Type": kind})


def test_retrieve_urls_begin_with_the_public_url(client: TestClient) -> None:
    stored = store_instance(client).json()
    for document in (stored, stored["00081199"]["Value"][0]):
        (url,) = document["00081190"]["Value"]
        assert url.startswith("https://reader.example/counterpart/dicomweb/studies/")


def test_series_that_are_sorted_too_slowly_keep_their_files_until_the_end(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = client.app.state.services  # type: ignore[attr-defined]
    incoming: Path = services.store.root / "incoming"
    release = threading.Event()
    found: list[Any] = []

    def slow(path: Path) -> Any:
        release.wait(60)
        found.append(identify(path))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(services.calls._transfers, "_seconds", 0.3)
        patch.setattr("app.api.stow.identify", slow)
        answer = store_instance(client)
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        assert len(list(incoming.iterdir())) == 1
        release.set()
        deadline = time.monotonic() + 60
        while list(incoming.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert [instance.is_image for instance in found] == [True]
    assert len(client.get(URL).json()["scans"]) == 1
    assert not list(incoming.iterdir())
