"""SIGTERM of a real `counterpart serve`: whoever waits for an answer gets one, and the process ends soon."""

import json
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2

from tests.api.service_process import RunningService, run_service
from tests.api.support import URL, WAIT, fake_scan

# Without a worker, every job stays in the queue, so that all callers wait when the signal comes.
COMMAND = (sys.executable, "-m", "app.cli", "serve", "--no-worker")
MAX_SECONDS = 30
ANNOUNCED_BYTES = 50_000_000
BLOCK = fake_scan().ljust(1 << 16, b"\0")


def test_sigterm_answers_everyone_who_waits(tiny_models: Path, tmp_path: Path) -> None:
    with run_service(tmp_path / "store", tmp_path / "log", COMMAND, models=str(tiny_models)) as service:
        job = service.http.post(URL, content=fake_scan(name="queued")).json()["id"]
        with ThreadPoolExecutor(5) as pool:
            waiters = [pool.submit(wait_for_result, service, name) for name in ("first", "second")]
            stream = pool.submit(read_events, service, job)
            uploads = [pool.submit(upload, service, pause) for pause in (60.0, 0.05)]
            wait_until_all_are_served(service, jobs=3)
            start = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            # uvicorn ends the process with the signal after its orderly end.
            assert service.process.wait(MAX_SECONDS) == -signal.SIGTERM
            seconds = time.monotonic() - start
        for waiter in waiters:
            answer = waiter.result()
            assert answer.status_code == 202
            assert answer.headers["location"] == f"{URL}/{answer.json()['id']}"
            assert answer.json()["state"] == "queued"
            assert int(answer.headers["retry-after"]) > 0
        assert '"state":"queued"' in stream.result()
        for status, headers, problem in (sender.result() for sender in uploads):
            assert (status, problem["code"]) == (503, "not_ready")
            assert "content-type: application/problem+json" in headers
            assert "retry-after" in headers
    assert seconds < MAX_SECONDS
    assert not list((tmp_path / "store").rglob("incoming/*"))
    with run_service(tmp_path / "store", tmp_path / "log", COMMAND, models=str(tiny_models)) as second:
        states = {scan["id"]: scan["state"] for scan in second.http.get(URL).json()["scans"]}
        assert states == dict.fromkeys({job, *(waiter.result().json()["id"] for waiter in waiters)}, "queued")


def wait_for_result(service: RunningService, name: str) -> httpx2.Response:
    return service.http.post(URL, content=fake_scan(name=name), headers=WAIT)


def read_events(service: RunningService, job: str) -> str:
    """Read an event stream to its end. An end without the last chunk raises an exception."""
    return service.http.get(f"{URL}/{job}/events").text


def upload(service: RunningService, pause: float) -> tuple[int, str, dict[str, object]]:
    """Send blocks with a pause between them until the service answers, and return status, headers and document."""
    with socket.create_connection(("127.0.0.1", service.port), 90) as connection:
        head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {ANNOUNCED_BYTES}\r\n\r\n"
        connection.sendall(head.encode() + BLOCK)
        answered = threading.Event()
        threading.Thread(target=send_blocks, args=(connection, pause, answered), daemon=True).start()
        answer = read_to_end(connection)
        answered.set()
    headers, _, body = answer.decode().partition("\r\n\r\n")
    return int(headers.split()[1]), headers.lower(), json.loads(body)


def read_to_end(connection: socket.socket) -> bytes:
    """Read an answer. Blocks that arrive after the service has closed the connection cause a reset behind it."""
    parts = []
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def send_blocks(connection: socket.socket, pause: float, answered: threading.Event) -> None:
    with suppress(OSError):  # the service has answered and closed the connection
        while not answered.wait(pause):
            connection.sendall(BLOCK)


def wait_until_all_are_served(service: RunningService, jobs: int) -> None:
    """Wait until the jobs of the waiting callers are queued, and both uploads have arrived in part."""
    deadline = time.monotonic() + 60
    while len(service.http.get(URL).json()["scans"]) < jobs:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
