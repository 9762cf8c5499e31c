"""STOW-RS with a fake engine: the URLs of the answer."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.api.support import BASE_URL, FakeEngine
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
