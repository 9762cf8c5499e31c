import io

import pytest
from fastapi.testclient import TestClient

from tests.api.support import FakeEngine, fake_scan

URL = "/v1/scans"
WAIT = {"Prefer": "wait=120"}
MIB = 1 << 20
FORM = "multipart/form-data; boundary=x"


def leftovers(client: TestClient) -> list[str]:
    store = client.app.state.service.store.root  # type: ignore[attr-defined]
    return [path.name for path in (store / "incoming").iterdir()]


@pytest.mark.parametrize("body", [b"", b"--x--\r\n"])
def test_nothing_is_400(client: TestClient, body: bytes) -> None:
    answer = client.post(URL, content=body, headers={"Content-Type": FORM} if body else {})
    assert answer.status_code == 400
    assert answer.json()["code"] == "empty_upload"


def test_an_empty_file_in_a_form_is_400(client: TestClient) -> None:
    answer = client.post(URL, files={"file": ("scan.nii", b"")})
    assert answer.status_code == 400
    assert answer.json()["code"] == "empty_upload"


@pytest.mark.parametrize("length", [5, 5000])
def test_text_is_415_whatever_its_name(client: TestClient, length: int) -> None:
    for answer in (
        client.post(URL, content=b"hello" * length, headers={"Content-Type": "application/gzip"}),
        client.post(URL, files={"file": ("scan.nii.gz", b"hello" * length)}),
    ):
        assert answer.status_code == 415
        assert answer.json()["code"] == "not_an_image_format"
    assert leftovers(client) == []


@pytest.mark.parametrize("declared", [True, False])
def test_too_large_is_413(client: TestClient, declared: bool) -> None:  # noqa: FBT001
    body = fake_scan() + bytes(MIB)
    answer = client.post(URL, content=body if declared else iter([body[:1000], body[1000:]]))
    assert answer.status_code == 413
    assert answer.json()["code"] == "upload_too_large"
    assert leftovers(client) == []


def test_a_form_of_many_files_is_one_scan(client: TestClient, engine: FakeEngine) -> None:
    files = [("file", ("a", fake_scan(part=1))), ("file", ("b", fake_scan(part=2))), ("x", ("DICOMDIR", b"no image"))]
    answer = client.post(URL, files=files, headers=WAIT)
    assert answer.status_code == 200
    folder, _ = engine.seen[-1]
    assert [path.name for path in sorted(folder.iterdir())] == ["000000", "000001", "000002"]
    assert (folder / "000001").read_bytes() == fake_scan(part=2)
    # The order of the slices does not make another scan.
    assert client.post(URL, files=files[::-1]).json()["id"] == answer.json()["id"]


def test_a_form_of_one_file_is_that_file(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post(URL, files={"file": io.BytesIO(fake_scan(alone=True))}, headers=WAIT)
    assert answer.status_code == 200
    assert engine.seen[-1][0].read_bytes() == fake_scan(alone=True)


def test_more_files_than_allowed_is_413(client: TestClient) -> None:
    files = [("file", (str(i), fake_scan(i=i))) for i in range(4)]
    answer = client.post(URL, files=files)
    assert answer.status_code == 413
    assert leftovers(client) == []


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"--x--\r\n"),
        (FORM, b"no boundary at all"),
        (FORM, b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nt1\r\n--x--\r\n'),
        (FORM, b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' + fake_scan()),
    ],
    ids=["boundary missing", "no form", "a field", "cut off"],
)
def test_a_malformed_form_is_400(client: TestClient, kind: str, body: bytes) -> None:
    answer = client.post(URL, content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert answer.json()["code"] == "bad_request"
    assert leftovers(client) == []


def related(*parts: bytes, boundary: str = "x") -> bytes:
    head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    return b"".join(head + part + b"\r\n" for part in parts) + f"--{boundary}--\r\n".encode()


RELATED = 'multipart/related; type="application/dicom"; boundary=x'


def test_a_dicomweb_message_is_its_parts(client: TestClient, engine: FakeEngine) -> None:
    body = related(fake_scan(related=1), fake_scan(related=2) + b"\r\n--xy\r\n")
    answer = client.post(URL, content=body, headers={"Content-Type": RELATED, **WAIT})
    assert answer.status_code == 200
    folder, _ = engine.seen[-1]
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == [
        fake_scan(related=1),
        fake_scan(related=2) + b"\r\n--xy\r\n",
    ]


@pytest.mark.parametrize(
    ("kind", "body", "status", "code"),
    [
        ("multipart/related", related(fake_scan()), 400, "bad_request"),
        (RELATED, related(fake_scan())[:-6], 400, "bad_request"),
        (RELATED, b"--x--\r\n", 400, "empty_upload"),
        (RELATED, related(b"hello" * 200), 415, "not_an_image_format"),
        (RELATED, related(*[fake_scan(i=i) for i in range(4)]), 413, "upload_too_large"),
    ],
    ids=["boundary missing", "cut off", "nothing", "no image", "too many"],
)
def test_a_dicomweb_message_that_is_refused(client: TestClient, kind: str, body: bytes, status: int, code: str) -> None:
    answer = client.post(URL, content=body, headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert leftovers(client) == []


def test_another_multipart_type_is_415(client: TestClient) -> None:
    answer = client.post(URL, content=b"--x--\r\n", headers={"Content-Type": "multipart/mixed; boundary=x"})
    assert answer.status_code == 415
