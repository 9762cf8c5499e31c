"""Retrieval of a series from a DICOMweb service that answers well, badly, slowly or not at all."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.errors import CounterpartError, InvalidSettings
from app.ingest.dicomweb_source import DicomWebSource, read_sources, retrieve_series
from tests.support.dicom import write_series
from tests.support.phantom import brain

Answer = Callable[[BaseHTTPRequestHandler], None]
MULTIPART = 'multipart/related; type="application/dicom"; boundary=part'


@contextmanager
def serve(answer: Answer) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/dicom-web"
        server.shutdown()


def send(handler: BaseHTTPRequestHandler, content: bytes, kind: str = MULTIPART, status: int = 200) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def multipart(parts: list[bytes]) -> bytes:
    return b"".join(b"\r\n--part\r\nContent-Type: application/dicom\r\n\r\n" + part for part in parts) + b"\r\n--part--"


def refusal(answer: Answer, max_bytes: int = 1 << 20, **options: object) -> str:
    with serve(answer) as url, pytest.raises(CounterpartError) as caught:
        retrieve_series(DicomWebSource.model_validate({"url": url, **options}), "1.2", "1.3", max_bytes, lambda _: None)
    return caught.value.code


def test_every_instance_is_retrieved_with_the_token(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "series", brain())
    (tmp_path / "token").write_text("abc\n")
    asked: list[tuple[str, str | None, str | None]] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append((handler.path, handler.headers["Authorization"], handler.headers["Accept"]))
        send(handler, multipart([path.read_bytes() for path in paths]))

    received: list[bytes] = []
    with serve(answer) as url:
        source = DicomWebSource.model_validate({"url": url, "token_file": tmp_path / "token"})
        assert retrieve_series(source, "1.2", "1.3", 1 << 30, received.append) == len(paths)
    assert received == [path.read_bytes() for path in paths]
    ((path, token, accept),) = asked
    assert (path, token) == ("/dicom-web/studies/1.2/series/1.3", "Bearer abc")
    assert accept is not None
    assert 'type="application/dicom"; transfer-syntax=*' in accept


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "unknown_series"), (401, "source_unavailable"), (500, "source_unavailable"), (302, "source_unavailable")],
)
def test_status(status: int, code: str) -> None:
    assert refusal(lambda handler: send(handler, b"", "text/plain", status)) == code


def test_redirect_is_not_followed() -> None:
    reached: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        reached.append(handler.path)
        handler.send_response(307)
        handler.send_header("Location", "/elsewhere")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    assert refusal(answer) == "source_unavailable"
    assert len(reached) == 1


@pytest.mark.parametrize(
    ("content", "kind", "code"),
    [
        (b"<html>", "text/html", "source_unavailable"),
        (multipart([b"no DICOM"]), MULTIPART, "source_unavailable"),
        (b"\r\n--part--", MULTIPART, "unknown_series"),
    ],
)
def test_something_else_than_instances(content: bytes, kind: str, code: str) -> None:
    assert refusal(lambda handler: send(handler, content, kind)) == code


def test_too_large() -> None:
    assert refusal(lambda handler: send(handler, multipart([bytes(5 << 20)])), max_bytes=1 << 20) == "upload_too_large"


def test_silent_source() -> None:
    started = time.monotonic()
    assert refusal(lambda _: time.sleep(3), read_seconds=0.3) == "source_unavailable"
    assert time.monotonic() - started < 3.5


def test_slow_source(tmp_path: Path) -> None:
    content = multipart([write_series(tmp_path / "series", brain())[0].read_bytes()])

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", MULTIPART)
        handler.end_headers()
        try:
            for _ in range(40):
                handler.wfile.write(content[:1000])
                time.sleep(0.1)
        except OSError:
            return

    started = time.monotonic()
    assert refusal(answer, total_seconds=0.5) == "source_unavailable"
    assert time.monotonic() - started < 5


def test_file_of_sources(tmp_path: Path) -> None:
    file = tmp_path / "sources.toml"
    file.write_text('[sources.pacs]\nurl = "https://pacs.example/dicom-web"\nca = "/etc/ca.pem"\n')
    assert str(read_sources(file)["pacs"].url) == "https://pacs.example/dicom-web"
    assert read_sources(None) == {}
    for text in ("[sources.pacs]\n", "[sources.pacs]\nurl = 'ftp://x'\n", "[sources.PACS]\nurl = 'http://x'\n", "x = "):
        file.write_text(text)
        with pytest.raises(InvalidSettings, match="COUNTERPART_SOURCES"):
            read_sources(file)
    with pytest.raises(InvalidSettings, match="No such file"):
        read_sources(tmp_path / "missing")
