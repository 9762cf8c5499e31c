"""What only a process of its own can show: signals, the wire, and the log."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx2

from app.api.logging import ALLOWED_KEYS
from tests.api.service_process import WITH_SUBPROCESS, RunningService, run_service
from tests.api.support import SECRET, fake_scan

URL = "/v1/scans"
# Seconds: far more than anything takes here, for machines that are busy with other things.
PATIENCE = 180


def until(http: httpx2.Client, job: str, state: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if http.get(f"{URL}/{job}").json()["state"] == state:
            return
        time.sleep(0.03)
    raise AssertionError(f"{job} was never {state}")


def test_a_service_that_is_killed_starts_again_and_tells_nobody_of_its_patients(tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    with run_service(store, log) as first:
        jobs = [first.http.post(URL, content=fake_scan(seconds=1, name=i)).json()["id"] for i in range(2)]
        until(first.http, jobs[0], "running")
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()

    with run_service(store, log, drain_seconds="0") as second:
        for job in jobs:
            until(second.http, job, "succeeded")
            assert second.http.get(f"{URL}/{job}/mask.nii.gz").content == b"mask.nii.gz" * 10
            assert [path.name for path in sorted((store / "jobs" / job).iterdir())] == ["results", "scan"]
        # Sent again after all that, it is still the same job.
        assert second.http.post(URL, content=fake_scan(seconds=1, name=0)).json()["id"] == jobs[0]
        assert len(second.http.get(URL).json()["scans"]) == 2
        # Nothing of it was a fault.
        assert not [line for line in log.read_text().splitlines() if json.loads(line)["level"] == "error"]

        _refuses_text_before_it_is_all_sent(second)
        _answers_while_it_infers(second)
        told = _plants_secrets(second.http)
        _ends_when_it_is_told_to(second)

    text = log.read_text()
    assert SECRET not in text
    assert SECRET not in told
    records = [json.loads(line) for line in text.splitlines()]
    assert len(records) > 8
    assert {key for record in records for key in record} <= ALLOWED_KEYS
    assert "ValueError" in {record.get("exception") for record in records}


def test_a_scan_that_kills_its_worker_twice_is_parked_and_the_queue_goes_on(tmp_path: Path) -> None:
    """Once the worker itself, as a container that is killed as one, and once its child under the worker's eyes."""
    store, log = tmp_path / "store", tmp_path / "log"
    with run_service(store, log, WITH_SUBPROCESS) as first:
        killer = first.http.post(URL, content=fake_scan(die=True, seconds=60)).json()["id"]
        waiting = first.http.post(URL, content=fake_scan(name="behind the killer")).json()["id"]
        until(first.http, killer, "running")
        first.process.kill()
        first.process.wait()
    with run_service(store, log, WITH_SUBPROCESS) as second:
        until(second.http, waiting, "succeeded")  # the killer stands behind it
        _kill_children(second.process.pid, while_running=lambda: until(second.http, killer, "running"))
        until(second.http, killer, "failed")
        problem = second.http.get(f"{URL}/{killer}").json()["problem"]
        assert (problem["code"], problem["status"]) == ("worker_lost", 500)
        assert "2 workers" in problem["found"]
        assert second.http.get("/readyz").status_code == 200
    assert "signal 9" in log.read_text()


def _kill_children(pid: int, while_running: Callable[[], None]) -> None:
    while_running()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            os.kill(int(child), signal.SIGKILL)


def _ends_when_it_is_told_to(service: RunningService) -> None:
    job = service.http.post(URL, content=fake_scan(seconds=60)).json()["id"]
    until(service.http, job, "running")
    with suppress(httpx2.TransportError), service.http.stream("GET", f"{URL}/{job}/events") as followed:
        service.process.send_signal(signal.SIGTERM)
        service.process.wait(45)  # long before the scan would end, and though somebody follows it
        followed.read()


def _refuses_text_before_it_is_all_sent(service: RunningService) -> None:
    with socket.create_connection(("127.0.0.1", service.port), 60) as wire:
        wire.sendall(b"POST /v1/scans HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"hello " * 1000)
        assert wire.recv(100).startswith(b"HTTP/1.1 415 ")


def _answers_while_it_infers(service: RunningService) -> None:
    """Inference sleeps in its thread; the event loop does not."""
    job = service.http.post(URL, content=fake_scan(seconds=60, name="busy")).json()["id"]
    until(service.http, job, "running")
    for _ in range(5):
        assert service.http.get("/livez").status_code == 200
    assert service.http.get(f"{URL}/{job}").json()["state"] == "running"
    assert service.http.delete(f"{URL}/{job}").status_code == 204


def _plants_secrets(http: httpx2.Client) -> str:
    """A patient's name in every place that a caller can put one; returns what is told to others."""
    name = SECRET.encode()
    form = {"file": (f"{SECRET}.nii", fake_scan(crash=SECRET, name=SECRET))}
    answers = [
        http.post(URL, params={"series": SECRET}, files=form, headers={"Idempotency-Key": SECRET, "Prefer": "wait=60"}),
        http.post(URL, params={"model": SECRET}, content=fake_scan()),
        http.post(URL, params={"seed": SECRET}, content=fake_scan()),
        http.post(URL, content=b"text of " + name),
        http.get(f"{URL}/{SECRET}"),
        http.get(f"/{SECRET}", params={"q": SECRET}, headers={"Authorization": f"Bearer {SECRET}"}),
        http.get(URL, params={"after": SECRET, "state": SECRET}),
    ]
    assert [answer.status_code for answer in answers] == [500, 400, 400, 415, 404, 404, 400]
    told = [answer.text for answer in answers]
    return "".join([*told, http.get("/metrics").text, http.get(URL).text])
