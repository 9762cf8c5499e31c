"""Answers of the server that no route gives, over a raw socket of a running service."""

import json
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.service_process import CHECKOUT, RunningService, run_service
from tests.api.support import URL, fake_scan

CONNECTIONS = 5
STARTER = (
    f"import runpy, sys\nfrom app.api import protocol\nprotocol.MAX_CONNECTIONS = {CONNECTIONS}\n"
    "sys.argv = ['service']\nrunpy.run_module('tests.api.service_process', run_name='__main__')\n"
)
HOST = b"Host: localhost\r\n"
POST = b"POST /v1/scans HTTP/1.1\r\n" + HOST


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """Return a service that accepts a few connections."""
    folder = tmp_path_factory.mktemp("service")
    (folder / "start.py").write_text(STARTER)
    command, environ = (sys.executable, str(folder / "start.py")), {"PYTHONPATH": str(CHECKOUT)}
    with run_service(folder / "store", folder / "log", command, environ) as service:
        yield service
        assert "Traceback" not in (folder / "log").read_text()


def exchange(service: RunningService, *blocks: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Send bytes, read until the service closes the connection, and return status, headers and document."""
    with socket.create_connection(("127.0.0.1", service.port), 30) as connection:
        for block in blocks:
            connection.sendall(block)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert int(headers["content-length"]) == len(body)
    return int(status.split()[1]), headers, json.loads(body)


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"hello\r\n\r\n", 400, "bad_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400, "bad_request"),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400, "bad_request"),
        (b"GET /livez HTTP/1.1\r\n" + HOST + b"A b: c\r\n\r\n", 400, "bad_request"),
        (b"GET /liv\xe9z HTTP/1.1\r\n" + HOST + b"\r\n", 400, "bad_request"),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400, "bad_request"),
        (POST + b"Content-Length: -1\r\n\r\n", 400, "bad_request"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nsize\r\n", 400, "bad_request"),
        (
            POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(fake_scan()) + fake_scan() + b"no end",
            400,
            "bad_request",
        ),
        (b"GET /livez HTTP/1.1\r\n" + HOST + b"X-Large: " + b"a" * 70_000, 431, "header_too_large"),
        (b"GET /" + b"a" * 70_000, 431, "header_too_large"),
    ],
    ids=[
        *("text", "TLS", "no host", "bad header", "bad path", "two lengths", "negative length", "bad chunk"),
        *("bad end of a chunk", "large header", "large path"),
    ],
)
def test_malformed_request_is_a_problem(service: RunningService, sent: bytes, status: int, code: str) -> None:
    answered, headers, problem = exchange(service, sent)
    assert (answered, headers["content-type"]) == (status, "application/problem+json")
    assert (problem["code"], problem["status"]) == (code, status)
    assert (headers["connection"], headers["x-content-type-options"]) == ("close", "nosniff")
    assert {"found", "expected", "advice"} <= problem.keys()
    assert service.http.get("/livez").status_code == 200


def test_too_many_connections_are_refused_with_a_problem(service: RunningService) -> None:
    idle = [socket.create_connection(("127.0.0.1", service.port), 30) for _ in range(CONNECTIONS)]
    try:
        status, headers, problem = exchange(service, b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n")
    finally:
        for connection in idle:
            connection.close()
    assert (status, problem["code"]) == (503, "too_many_connections")
    assert int(headers["retry-after"]) > 0
    assert service.http.get(URL).status_code == 200
