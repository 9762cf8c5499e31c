"""Receive an upload: body, form, DICOMweb message, and their limits."""

import asyncio
import errno
import gzip
from collections.abc import AsyncIterator

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from tests.api.support import URL, WAIT, FakeEngine, fake_scan

MIB = 1 << 20
FORM = "multipart/form-data; boundary=x"
RELATED = 'multipart/related; type="application/dicom"; boundary=x'


def related(*parts: bytes) -> bytes:
    """Return a multipart/related body."""
    head = b"--x\r\nContent-Type: application/dicom\r\n\r\n"
    return b"".join(head + part + b"\r\n" for part in parts) + b"--x--\r\n"


def form(*parts: bytes) -> bytes:
    """Return a multipart/form-data body."""
    head = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n'
    return b"".join(head + part + b"\r\n" for part in parts) + b"--x--\r\n"


@pytest.mark.parametrize(
    ("media_type", "body", "status", "code"),
    [
        pytest.param("", b"", 400, "empty_upload", id="empty body"),
        pytest.param(FORM, b"--x--\r\n", 400, "empty_upload", id="empty form"),
        pytest.param(FORM, form(b""), 400, "empty_upload", id="empty file"),
        pytest.param(RELATED, b"--x--\r\n", 400, "empty_upload", id="empty message"),
        pytest.param("application/gzip", b"hello" * 5, 415, "not_an_image_format", id="short text"),
        pytest.param("application/gzip", b"hello" * 5000, 415, "not_an_image_format", id="long text"),
        pytest.param(FORM, form(b"hello" * 5), 415, "not_an_image_format", id="short text in a form"),
        pytest.param(FORM, form(b"hello" * 5000), 415, "not_an_image_format", id="long text in a form"),
        pytest.param(RELATED, related(b"hello" * 200), 415, "not_an_image_format", id="text in a message"),
        pytest.param("multipart/mixed; boundary=x", b"--x--\r\n", 415, "not_an_image_format", id="multipart/mixed"),
        pytest.param("", fake_scan() + bytes(MIB), 413, "upload_too_large", id="too many bytes"),
        pytest.param(
            FORM, form(*[fake_scan(i=i) for i in range(4)]), 413, "upload_too_large", id="too many files in a form"
        ),
        pytest.param(
            RELATED, related(*[fake_scan(i=i) for i in range(4)]), 413, "upload_too_large", id="too many in a message"
        ),
        pytest.param("multipart/form-data", b"--x--\r\n", 400, "bad_request", id="form without boundary"),
        pytest.param("multipart/related", related(fake_scan()), 400, "bad_request", id="message without boundary"),
        pytest.param(FORM, b"no boundary at all", 400, "bad_request", id="not a form"),
        pytest.param(FORM, form(fake_scan())[:-8], 400, "bad_request", id="truncated form"),
        pytest.param(RELATED, related(fake_scan())[:-6], 400, "bad_request", id="truncated message"),
        pytest.param(
            FORM,
            b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nt1\r\n--x--\r\n',
            400,
            "bad_request",
            id="form with a field",
        ),
    ],
)
def test_bad_upload_is_refused(client: TestClient, media_type: str, body: bytes, status: int, code: str) -> None:
    answer = client.post(URL, content=body, headers={"Content-Type": media_type} if media_type else {})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    store = client.app.state.services.store.root  # type: ignore[attr-defined]
    assert list((store / "incoming").iterdir()) == []


def test_upload_without_content_length_is_limited(client: TestClient) -> None:
    body = fake_scan() + bytes(MIB)
    answer = client.post(URL, content=iter([body[:1000], body[1000:]]))
    assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")


def test_form_of_many_files_is_one_scan(client: TestClient, engine: FakeEngine) -> None:
    files = [
        ("file", ("a", fake_scan(part=1))),
        ("file", ("b", fake_scan(part=2))),
        ("x", ("DICOMDIR", b"not an image")),
    ]
    answer = client.post(URL, files=files, headers=WAIT)
    assert answer.status_code == 200
    folder, _ = engine.inferences[-1]
    assert [path.name for path in sorted(folder.iterdir())] == ["000000", "000001", "000002"]
    assert (folder / "000001").read_bytes() == fake_scan(part=2)
    # The job does not depend on the order of the slices.
    assert client.post(URL, files=files[::-1]).json()["id"] == answer.json()["id"]


def test_form_of_one_file_is_that_file(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post(URL, files={"file": fake_scan(alone=True)}, headers=WAIT)
    assert answer.status_code == 200
    assert engine.inferences[-1][0].read_bytes() == fake_scan(alone=True)


def test_dicomweb_message_is_split_into_its_parts(client: TestClient, engine: FakeEngine) -> None:
    parts = [fake_scan(related=1), fake_scan(related=2) + b"\r\n--xy\r\n"]
    answer = client.post(URL, content=related(*parts), headers={"Content-Type": RELATED, **WAIT})
    assert answer.status_code == 200
    folder, _ = engine.inferences[-1]
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == parts


def send_encoded(client: TestClient, body: bytes, encoding: str, media_type: str = "") -> Response:
    headers = {"Content-Encoding": encoding, "Content-Type": media_type}
    return client.post(URL, content=body, headers={**headers, **WAIT})


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP"])
def test_gzip_encoded_body_is_the_same_scan(client: TestClient, encoding: str) -> None:
    scan = fake_scan(name="encoded")
    plain = client.post(URL, content=scan, headers=WAIT).json()["id"]
    assert send_encoded(client, gzip.compress(scan), encoding).json()["id"] == plain
    assert send_encoded(client, gzip.compress(scan[:100]) + gzip.compress(scan[100:]), encoding).json()["id"] == plain
    assert send_encoded(client, gzip.compress(form(scan)), encoding, FORM).json()["id"] == plain
    assert send_encoded(client, scan, "identity").json()["id"] == plain


@pytest.mark.parametrize(
    ("encoding", "body", "status", "code"),
    [
        ("br", b"x", 415, "unsupported_encoding"),
        ("gzip, gzip", b"x", 415, "unsupported_encoding"),
        ("gzip", fake_scan(), 400, "bad_request"),
        ("gzip", gzip.compress(fake_scan(), mtime=0)[:-9], 400, "bad_request"),
        ("gzip", gzip.compress(fake_scan() + bytes(50 * MIB), mtime=0), 413, "upload_too_large"),
        ("gzip", b"", 400, "empty_upload"),
    ],
)
def test_other_or_broken_encoding_is_refused(
    client: TestClient, encoding: str, body: bytes, status: int, code: str
) -> None:
    answer = send_encoded(client, body, encoding)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_upload_that_stops_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stream(_: object) -> AsyncIterator[bytes]:
        yield fake_scan()
        await asyncio.sleep(60)

    monkeypatch.setattr("app.api.upload.BODY_SECONDS", 0.2)
    monkeypatch.setattr("starlette.requests.Request.stream", stream)
    answer = client.post(URL, content=b"")
    assert (answer.status_code, answer.json()["code"]) == (408, "upload_too_slow")
    store = client.app.state.services.store.root  # type: ignore[attr-defined]
    assert not list((store / "incoming").iterdir())


def test_upload_of_single_bytes_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stream(_: object) -> AsyncIterator[bytes]:
        for byte in fake_scan():
            yield bytes([byte])
            await asyncio.sleep(0.05)  # shorter than the longest break

    monkeypatch.setattr("app.api.upload.BODY_SECONDS", 0.3)
    monkeypatch.setattr("starlette.requests.Request.stream", stream)
    answer = client.post(URL, content=b"")
    assert (answer.status_code, answer.json()["code"]) == (408, "upload_too_slow")


def test_disk_that_becomes_full_during_a_pull_is_no_fault_of_the_code(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    services = client.app.state.services  # type: ignore[attr-defined]
    monkeypatch.setitem(services.sources, "pacs", object())
    monkeypatch.setattr("app.api.pull.retrieve_series", fill)
    answer = client.post(URL, json={"source": "pacs", "study": "1.2", "series": "1.2.3"})
    assert (answer.status_code, answer.json()["code"]) == (507, "store_full")
