"""Behaviour that needs a process of its own: signals, the socket, and the log."""

import json
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx2

from app.api.server import ALLOWED_KEYS
from tests.api.service_process import WITH_SUBPROCESS, RunningService, run_service
from tests.api.support import PATIENT_NAME, URL, fake_scan, send_running, wait_for_state


def test_killed_service_resumes_its_jobs_and_leaks_no_patient_name(tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    with run_service(store, log) as first:
        jobs = [first.http.post(URL, content=fake_scan(seconds=1, name=i)).json()["id"] for i in range(2)]
        wait_for_state(first.http, jobs[0], "running")
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()

    with run_service(store, log, drain_seconds="0") as second:
        for job in jobs:
            wait_for_state(second.http, job, "succeeded")
            assert second.http.get(f"{URL}/{job}/mask.nii.gz").content == b"mask.nii.gz" * 10
            assert [path.name for path in sorted((store / "jobs" / job).iterdir())] == ["results", "scan"]
        assert second.http.post(URL, content=fake_scan(seconds=1, name=0)).json()["id"] == jobs[0]
        assert len(second.http.get(URL).json()["scans"]) == 2
        assert not [line for line in log.read_text().splitlines() if json.loads(line)["level"] == "error"]

        _check_early_refusal(second)
        _check_responses_during_inference(second)
        responses = _send_patient_name(second.http)
        _check_shutdown(second)

    text = log.read_text()
    assert PATIENT_NAME not in text
    assert PATIENT_NAME not in responses
    records = [json.loads(line) for line in text.splitlines()]
    assert len(records) > 8
    assert {key for record in records for key in record} <= ALLOWED_KEYS
    assert "ValueError" in {record.get("exception") for record in records}


def test_scan_that_ends_two_processes_fails_and_the_queue_continues(tmp_path: Path) -> None:
    """The first death is that of the whole worker, the second one that of its child process."""
    store, log = tmp_path / "store", tmp_path / "log"
    with run_service(store, log, WITH_SUBPROCESS) as first:
        killer = first.http.post(URL, content=fake_scan(exit_process=True, seconds=60)).json()["id"]
        waiting = first.http.post(URL, content=fake_scan(name="behind the killer")).json()["id"]
        wait_for_state(first.http, killer, "running")
        first.process.kill()
        first.process.wait()
    with run_service(store, log, WITH_SUBPROCESS) as second:
        wait_for_state(second.http, waiting, "succeeded")
        _kill_children(second.process.pid, while_running=lambda: wait_for_state(second.http, killer, "running"))
        problem = wait_for_state(second.http, killer, "failed")["problem"]
        assert (problem["code"], problem["status"]) == ("worker_lost", 500)
        assert "2 times" in problem["found"]
        assert second.http.get("/readyz").status_code == 200
    assert "signal 9" in log.read_text()


def _kill_children(pid: int, while_running: Callable[[], object]) -> None:
    while_running()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            os.kill(int(child), signal.SIGKILL)


def _check_shutdown(service: RunningService) -> None:
    """Neither a long scan nor an open event stream delays the shutdown."""
    job = send_running(service.http)
    with suppress(httpx2.TransportError), service.http.stream("GET", f"{URL}/{job}/events") as events:
        service.process.send_signal(signal.SIGTERM)
        service.process.wait(45)
        events.read()


def _check_early_refusal(service: RunningService) -> None:
    """A text is refused before all of it was sent."""
    with socket.create_connection(("127.0.0.1", service.port), 60) as connection:
        connection.sendall(
            b"POST /v1/scans HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n" + b"hello " * 1000
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 415 ")


def _check_responses_during_inference(service: RunningService) -> None:
    """The inference does not block the event loop."""
    job = send_running(service.http, name="busy")
    for _ in range(5):
        assert service.http.get("/livez").status_code == 200
    assert service.http.get(f"{URL}/{job}").json()["state"] == "running"
    assert service.http.delete(f"{URL}/{job}").status_code == 204


def _send_patient_name(http: httpx2.Client) -> str:
    """Send a patient's name in every part of a request, and return all responses."""
    name = PATIENT_NAME
    form = {"file": (f"{name}.nii", fake_scan(raise_value_error=name, name=name))}
    answers = [
        http.post(URL, params={"series": name}, files=form, headers={"Idempotency-Key": name, "Prefer": "wait=60"}),
        http.post(URL, params={"model": name}, content=fake_scan()),
        http.post(URL, params={"seed": name}, content=fake_scan()),
        http.post(URL, content=b"text of " + name.encode()),
        http.get(f"{URL}/{name}"),
        http.get(f"/{name}", params={"q": name}, headers={"Authorization": f"Bearer {name}"}),
        http.get(URL, params={"after": name, "state": name}),
    ]
    assert [answer.status_code for answer in answers] == [500, 400, 400, 415, 404, 404, 400]
    return "".join([*(answer.text for answer in answers), http.get("/metrics").text, http.get(URL).text])
