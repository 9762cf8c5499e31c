"""Results reach a PACS by C-STORE and by STOW-RS, and every failure has its code."""

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    SegmentationStorage,
)
from pynetdicom import AE, evt

from app.dicom_attributes import silence_libraries
from app.pacs.routes import DimseTarget, StowTarget
from app.pacs.senders import NotSent, send
from app.pacs.tls import server_context
from tests.pacs.certificates import Authority
from tests.pacs.support import make_slices
from tests.support.servers import free_port

LABEL_MAP_STORAGE = UID("1.2.840.10008.5.1.4.1.1.66.7")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (dataset,) = make_slices(count=1)
    dataset.save_as(tmp_path / "result.dcm", enforce_file_format=True)
    return tmp_path / "result.dcm"


@contextmanager
def scp(
    status: int = 0, syntax: str = ExplicitVRLittleEndian, sop_class: str = MRImageStorage, **options: Any
) -> Iterator[tuple[DimseTarget, list[pydicom.Dataset]]]:
    """Start an SCP that keeps what it receives, and answers with a status; -1 aborts the association instead."""
    stored: list[pydicom.Dataset] = []

    def answer(event: evt.Event) -> int:
        stored.append(event.dataset)
        if status < 0:
            event.assoc.abort()
        return max(status, 0)

    entity = AE("ARCHIVE")
    entity.require_called_aet = True
    entity.add_supported_context(sop_class, syntax)
    server = entity.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, answer)], ae_title="ARCHIVE", **options
    )
    assert server is not None
    port = server.server_address[1]
    try:
        yield DimseTarget(kind="dimse", host="127.0.0.1", port=port, ae_title="ARCHIVE"), stored
    finally:
        entity.shutdown()


def code_of(path: Path, target: DimseTarget | StowTarget) -> str:
    with pytest.raises(NotSent) as failure:
        send(path, target)
    return failure.value.code


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_c_store_uses_the_encoding_that_the_pacs_accepts(path: Path, syntax: str) -> None:
    with scp(syntax=syntax) as (target, stored):
        send(path, target)
    assert [dataset for dataset in stored if dataset != pydicom.dcmread(path)] == []
    assert len(stored) == 1


def test_a_label_map_is_sent_with_its_class(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = LABEL_MAP_STORAGE
    dataset.save_as(path, enforce_file_format=True)
    with scp(sop_class=LABEL_MAP_STORAGE) as (target, stored):
        send(path, target)
    assert [received.SOPClassUID for received in stored] == [LABEL_MAP_STORAGE]
    with scp(sop_class=SegmentationStorage) as (target, _):
        assert code_of(path, target) == "unsupported"


@pytest.mark.parametrize("status", [0xB000, 0xB006, 0xB007, 0x0111])
def test_warnings_and_duplicates_are_stored(path: Path, status: int) -> None:
    with scp(status) as (target, _):
        send(path, target)


@pytest.mark.parametrize(("status", "code"), [(0xA700, "0xA700"), (0xC001, "0xC001"), (-1, "aborted")])
def test_a_c_store_that_fails_has_the_code_of_its_status(path: Path, status: int, code: str) -> None:
    with scp(status) as (target, _):
        assert code_of(path, target) == code


def test_a_pacs_that_does_not_answer_accept_or_support_has_its_code(path: Path) -> None:
    with scp(sop_class=SegmentationStorage) as (target, _):
        assert code_of(path, target) == "unsupported"
        assert code_of(path, target.model_copy(update={"ae_title": "OTHER"})) == "rejected"
        assert code_of(path, target.model_copy(update={"port": free_port()})) == "unreachable"


def test_c_store_over_tls_checks_the_pacs(path: Path, tmp_path: Path) -> None:
    authority, stranger = Authority.create(tmp_path / "ca"), Authority.create(tmp_path / "other")
    certificate, key = authority.issue("counterpart")
    context = server_context(*authority.issue("pacs"), authority.path)
    with scp(ssl_context=context) as (target, stored):
        tls = {"tls": True, "ca": authority.path, "certificate": certificate, "key": key}
        assert code_of(path, target) in {"unreachable", "aborted"}
        assert code_of(path, target.model_copy(update={**tls, "ca": stranger.path})) == "unreachable"
        assert code_of(path, target.model_copy(update={**tls, "certificate": None})) in {"unreachable", "aborted"}
        assert stored == []
        send(path, target.model_copy(update=tls))
    assert len(stored) == 1


class StowHandler(BaseHTTPRequestHandler):
    """STOW-RS server that answers with the next of its prepared answers, and keeps its requests."""

    answers: list[tuple[int, dict[str, Any]]]
    requests: list[tuple[str, dict[str, str], bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, dict(self.headers), body))
        status, answer = self.answers.pop(0)
        data = json.dumps(answer).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/other")
        self.send_header("Content-Type", "application/dicom+json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def stow(
    *answers: tuple[int, dict[str, Any]], context: ssl.SSLContext | None = None
) -> Iterator[tuple[StowTarget, type[StowHandler]]]:
    handler = type("Handler", (StowHandler,), {"answers": list(answers), "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"{'https' if context else 'http'}://127.0.0.1:{server.server_port}/web"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield (
            StowTarget.model_validate({"kind": "stow", "url": url}),
            handler,
        )
    finally:
        server.shutdown()
        server.server_close()


def items(tag: str, *values: dict[str, Any]) -> dict[str, Any]:
    return {tag: {"vr": "SQ", "Value": list(values)}}


def stored_item(path: Path) -> dict[str, Any]:
    return {"00081155": {"vr": "UI", "Value": [pydicom.dcmread(path).SOPInstanceUID]}}


def test_stow_sends_the_object_and_the_token(path: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    with stow((200, items("00081199", stored_item(path)))) as (target, handler):
        send(path, target.model_copy(update={"token_file": tmp_path / "token"}))
    ((url, headers, body),) = handler.requests
    assert url == "/web/studies"
    assert headers["Authorization"] == "Bearer s3cret"
    assert path.read_bytes()[200:] in body


def test_stow_over_tls_checks_the_pacs(path: Path, tmp_path: Path) -> None:
    authority, stranger = Authority.create(tmp_path / "ca"), Authority.create(tmp_path / "other")
    certificate, key = authority.issue("counterpart")
    context = server_context(*authority.issue("pacs"), authority.path)
    answer = (200, items("00081199", stored_item(path)))
    with stow(answer, context=context) as (target, handler):
        assert target.url.scheme == "https"
        tls = {"ca": authority.path, "certificate": certificate, "key": key}
        for wrong in ({}, {**tls, "ca": stranger.path}, {**tls, "certificate": None, "key": None}):
            assert code_of(path, target.model_copy(update=wrong)) == "unreachable"
        assert handler.requests == []
        send(path, target.model_copy(update=tls))
    assert len(handler.requests) == 1


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ((503, {}), "http_503"),
        ((401, {}), "http_401"),
        ((302, {}), "redirected"),
        ((202, items("00081198", {"00081197": {"vr": "US", "Value": [0xA700]}})), "0xA700"),
        ((200, {}), "unconfirmed"),
    ],
)
def test_a_stow_that_fails_has_its_code(path: Path, answer: tuple[int, dict[str, Any]], code: str) -> None:
    with stow(answer) as (target, handler):
        assert code_of(path, target) == code
    assert len(handler.requests) == 1


def test_a_stow_server_that_does_not_answer_is_unreachable(path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/web"
    assert code_of(path, StowTarget.model_validate({"kind": "stow", "url": url})) == "unreachable"


def test_target_that_does_not_answer_blocks_no_other_reader_of_dicom(path: Path) -> None:
    """`silence_libraries` is a lock of the process: nobody may hold it while a network answers."""
    received, release = threading.Event(), threading.Event()

    def answer(_: evt.Event) -> int:
        received.set()
        release.wait(30)
        return 0

    entity = AE("ARCHIVE")
    entity.add_supported_context(MRImageStorage)
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, answer)])
    assert server is not None
    target = DimseTarget(kind="dimse", host="127.0.0.1", port=server.server_address[1], ae_title="ARCHIVE")
    sending = threading.Thread(target=send, args=(path, target))
    free = threading.Event()

    def read() -> None:
        with silence_libraries():
            free.set()

    sending.start()
    try:
        assert received.wait(30)
        threading.Thread(target=read, daemon=True).start()
        assert free.wait(5)
    finally:
        release.set()
        sending.join()
        entity.shutdown()
