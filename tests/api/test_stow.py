"""STOW-RS with a fake engine: the URLs of the answer, and a store that hangs."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from app.ingest.dicom.instances import IMAGE_CLASSES, identify
from app.ingest.dicom.storage import TRANSFER_SYNTAXES
from app.main import create_app
from app.settings import Settings
from tests.api.support import BASE_URL, URL, FakeEngine
from tests.support.dicom import make_datasets
from tests.support.phantom import brain

REFERENCED, FAILED, OTHERS = "00081199", "00081198", "0008119A"
PUBLIC_URL = "https://reader.example/counterpart/"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(store=str(tmp_path / "store"), drain_seconds=0, public_url=PUBLIC_URL)
    with TestClient(create_app(settings, FakeEngine(), worker=False), BASE_URL) as client:
        yield client


def store_instance(client: TestClient) -> httpx2.Response:
    return store(client, make_datasets(brain())[0])


def store(client: TestClient, *datasets: Dataset) -> httpx2.Response:
    content = b"".join(map(encode, datasets)) + b"\r\n--part--\r\n"
    kind = 'multipart/related; type="application/dicom"; boundary=part'
    return client.post("/dicomweb/studies", content=content, headers={"Content-Type": kind})


def encode(dataset: Dataset) -> bytes:
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return b"\r\n--part\r\nContent-Type: application/dicom\r\n\r\n" + buffer.getvalue()


def make_instance(series: str, sop_class: UID = MRImageStorage, syntax: UID = ExplicitVRLittleEndian) -> Dataset:
    """Return an instance with one pixel, which only its headers identify."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", series
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.Rows = dataset.Columns = dataset.SamplesPerPixel = 1
    dataset.BitsAllocated = 8
    dataset.PixelData = encapsulate([b"\0\0"]) if syntax.is_encapsulated else b"\0\0"
    dataset["PixelData"].VR = "OB"
    return dataset


def test_every_class_is_stored_in_every_transfer_syntax(client: TestClient) -> None:
    instances = [
        make_instance("1.2.4", sop_class, syntax) for sop_class in IMAGE_CLASSES for syntax in TRANSFER_SYNTAXES
    ]
    answer = store(client, *instances)
    stored = {item["00081155"]["Value"][0]: item["00081150"]["Value"][0] for item in answer.json()[REFERENCED]["Value"]}
    assert answer.status_code == 200
    assert stored == {str(instance.SOPInstanceUID): str(instance.SOPClassUID) for instance in instances}


def test_a_deflated_instance_that_inflates_to_many_times_its_size_is_not_understood(client: TestClient) -> None:
    bomb = make_instance("1.2.4", syntax=DeflatedExplicitVRLittleEndian)
    bomb.PixelData = bytes(65 << 20)
    answer = store(client, make_instance("1.2.4"), bomb)
    document = answer.json()
    assert answer.status_code == 202
    assert len(document[REFERENCED]["Value"]) == 1
    assert [item["00081197"]["Value"] for item in document[OTHERS]["Value"]] == [[0xC000]]


def test_capacity_that_ends_between_two_series_fails_the_second_one(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = client.app.state.services.queue  # type: ignore[attr-defined]
    monkeypatch.setattr(queue, "_limits", replace(queue._limits, queue_limit=1))
    first, second = make_instance("1.2.5"), make_instance("1.2.6")
    answer = store(client, first, second)
    document = answer.json()
    (failed,) = document[FAILED]["Value"]
    assert answer.status_code == 202
    assert len(document[REFERENCED]["Value"]) == 1
    assert failed["00081197"]["Value"] == [0xA700]
    assert len(client.get(URL).json()["scans"]) == 1
    refused = store(client, make_instance("1.2.7"))
    assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
    assert "Retry-After" in refused.headers


def test_a_full_disk_refuses_the_request(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = client.app.state.services.queue  # type: ignore[attr-defined]
    monkeypatch.setattr(queue, "_limits", replace(queue._limits, min_free_gb=1e9))
    answer = store_instance(client)
    assert (answer.status_code, answer.json()["code"]) == (507, "store_full")


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
