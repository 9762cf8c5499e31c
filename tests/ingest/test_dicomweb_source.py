"""Retrieval of a series from a DICOMweb service that answers well, badly, slowly or not at all."""

import gzip
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.errors import CounterpartError, InvalidSettings
from app.ingest.dicomweb_source import DicomWebSource, read_sources, retrieve_series
from tests.support.dicom import write_series
from tests.support.phantom import brain

Answer = Callable[[BaseHTTPRequestHandler], None]
MULTIPART = 'multipart/related; type="application/dicom"; boundary=part'
INSTANCE = bytes(128) + b"DICM" + bytes(100)


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


class Files:
    """Receiver that keeps the files of a series."""

    def __init__(self) -> None:
        self.files: list[bytearray] = []
        self.ended = 0

    def begin(self) -> None:
        self.files.append(bytearray())

    def write(self, data: bytes) -> None:
        self.files[-1] += data

    def end(self) -> None:
        self.ended += 1


class Counter(Files):
    """Receiver that counts bytes."""

    size = 0

    def write(self, data: bytes) -> None:
        self.size += len(data)


def refusal(answer: Answer, max_bytes: int = 1 << 20, **options: object) -> str:
    with serve(answer) as url, pytest.raises(CounterpartError) as caught:
        retrieve_series(DicomWebSource.model_validate({"url": url, **options}), "1.2", "1.3", max_bytes, Counter())
    return caught.value.code


def test_every_instance_is_retrieved_with_the_token(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "series", brain())
    (tmp_path / "token").write_text("abc\n")
    asked: list[tuple[str, str | None, str | None]] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append((handler.path, handler.headers["Authorization"], handler.headers["Accept"]))
        send(handler, multipart([path.read_bytes() for path in paths]))

    receiver = Files()
    with serve(answer) as url:
        source = DicomWebSource.model_validate({"url": url, "token_file": tmp_path / "token"})
        assert retrieve_series(source, "1.2", "1.3", 1 << 30, receiver) == len(paths)
    assert receiver.files == [path.read_bytes() for path in paths]
    assert receiver.ended == len(paths)
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
        (multipart([bytes(128) + b"DIC"]), MULTIPART, "source_unavailable"),
        (multipart([INSTANCE, b""]), MULTIPART, "source_unavailable"),
        (multipart([INSTANCE])[:-2], MULTIPART, "source_unavailable"),  # without its end
        (multipart([INSTANCE]), MULTIPART.partition("; boundary")[0], "source_unavailable"),
        (INSTANCE, "application/dicom", "source_unavailable"),
        (b"", MULTIPART, "source_unavailable"),
        (b"\r\n--part--", MULTIPART, "unknown_series"),
    ],
)
def test_something_else_than_instances(content: bytes, kind: str, code: str) -> None:
    assert refusal(lambda handler: send(handler, content, kind)) == code


def test_too_large() -> None:
    assert (
        refusal(lambda handler: send(handler, multipart([INSTANCE + bytes(5 << 20)])), max_bytes=1 << 20)
        == "upload_too_large"
    )


@pytest.mark.parametrize("chunked", [False, True])
def test_an_instance_is_never_in_memory_as_a_whole(*, chunked: bool) -> None:
    """An instance of 64 MB arrives in blocks, whose boundaries cut the delimiter of the message."""
    block, blocks = bytes(1 << 16), 1024
    begin, _, end = multipart([INSTANCE + b"|"]).partition(b"|")

    def parts() -> Iterator[bytes]:
        yield begin
        yield from (block for _ in range(blocks))
        yield from (end[i : i + 1] for i in range(len(end)))

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Content-Type", MULTIPART)
        size = len(begin) + blocks * len(block) + len(end)
        handler.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(size))))
        handler.end_headers()
        for part in parts():
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
        handler.wfile.write(b"0\r\n\r\n" if chunked else b"")

    receiver = Counter()
    with serve(answer) as url:
        retrieve_series(DicomWebSource.model_validate({"url": url}), "1.2", "1.3", 1 << 30, Counter())  # imports
        tracemalloc.start()
        try:
            retrieve_series(DicomWebSource.model_validate({"url": url}), "1.2", "1.3", 1 << 30, receiver)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert receiver.size == len(INSTANCE) + blocks * len(block)
    assert peak < 2 << 20


def test_a_message_that_is_compressed_is_inflated() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        content = gzip.compress(multipart([INSTANCE]))
        handler.send_response(200)
        handler.send_header("Content-Type", MULTIPART)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    receiver = Files()
    with serve(answer) as url:
        assert retrieve_series(DicomWebSource.model_validate({"url": url}), "1.2", "1.3", 1 << 30, receiver) == 1
    assert receiver.files == [INSTANCE]


def test_a_source_that_sends_single_bytes_is_left_in_time() -> None:
    is_left_in_time(b"\r", length=100_000)


def is_left_in_time(block: bytes, length: int | None = None) -> None:
    """Check that a source that sends a block every 0.1 s is left after the allowed time."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", MULTIPART)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        with suppress(OSError):
            for _ in range(40):
                handler.wfile.write(block)
                time.sleep(0.1)

    started = time.monotonic()
    assert refusal(answer, total_seconds=0.5) == "source_unavailable"
    assert time.monotonic() - started < 3.5


def test_silent_source() -> None:
    started = time.monotonic()
    assert refusal(lambda _: time.sleep(3), read_seconds=0.3) == "source_unavailable"
    assert time.monotonic() - started < 3.5


def test_slow_source(tmp_path: Path) -> None:
    is_left_in_time(multipart([write_series(tmp_path / "series", brain())[0].read_bytes()])[:1000])


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
