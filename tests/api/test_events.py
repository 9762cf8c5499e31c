"""Server-sent events of a job."""

import json
import threading
from typing import Any

from fastapi.testclient import TestClient

from tests.api.support import TIMEOUT_SECONDS, URL, send, send_running, wait_for_state

END = {"state": "succeeded", "stage": None, "percent": 100.0, "queue_position": None, "seconds_left": None}


def read_events(client: TestClient, job: str) -> list[tuple[str, dict[str, Any]]]:
    """Return every event of a job until the end of the stream."""
    with client.stream("GET", f"{URL}/{job}/events") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    fields = [dict(line.split(": ", 1) for line in part.splitlines()) for part in text.split("\n\n") if part]
    return [(field["event"], json.loads(field["data"])) for field in fields if "event" in field]


def test_events_follow_a_job_until_its_end(client: TestClient) -> None:
    blocker = send(client, wait=False, seconds=2, name="ahead").json()["id"]
    wait_for_state(client, blocker, "running")
    job = send(client, wait=False, seconds=3, name="followed").json()["id"]
    events = read_events(client, job)
    assert events[0] == (
        "progress",
        {"state": "queued", "stage": None, "percent": 0.0, "queue_position": 1, "seconds_left": None},
    )
    running = [event for _, event in events if event["state"] == "running"]
    assert running[-1]["stage"] in {"infer", "export"}
    estimates = [event["seconds_left"] for event in running if event["seconds_left"] is not None]
    assert estimates
    assert all(0 <= seconds < TIMEOUT_SECONDS for seconds in estimates)
    assert [event["percent"] for event in running] == sorted(event["percent"] for event in running)
    assert events[-1] == ("end", END)
    assert [name for name, _ in events].count("end") == 1
    assert read_events(client, job) == [("end", END)]


def test_events_end_when_the_job_is_erased(client: TestClient) -> None:
    job = send_running(client)
    threading.Timer(1, lambda: client.delete(f"{URL}/{job}")).start()
    assert read_events(client, job)[-1] == ("end", {"state": "erased"})


def test_unknown_job_has_no_events(client: TestClient) -> None:
    assert client.get(f"{URL}/none/events").status_code == 404
