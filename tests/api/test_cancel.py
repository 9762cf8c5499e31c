"""The worker is free again within a second after a job was cancelled."""

import time
from pathlib import Path

import pytest

from app.jobs.subprocess_engine import POLL_SECONDS, STOP_SECONDS
from app.jobs.worker import CHECK_SECONDS
from tests.api.service_process import WITH_SUBPROCESS, run_service
from tests.api.support import URL, fake_scan, send, wait_for_state

SECOND = 1.0
# A busy machine adds to each measurement, so the shortest of several counts, and it may be longer than a second.
REPEATS, BUSY_FACTOR = 5, 4.0


def test_delays_of_a_cancellation_add_up_to_less_than_a_second() -> None:
    """Each of these delays may occur in full; two queries and a signal come on top."""
    assert CHECK_SECONDS + POLL_SECONDS + STOP_SECONDS <= 0.8 * SECOND


def wait_for_work_folder(job: Path, *, exists: bool) -> float:
    """Wait until a worker has created or removed the folder of its attempt, and return the time."""
    deadline = time.monotonic() + 60
    while any(job.glob("work-*")) != exists and time.monotonic() < deadline:
        time.sleep(0.01)
    return time.monotonic()


@pytest.mark.parametrize(
    "orders",
    [
        pytest.param({"seconds": 60}, id="between two evaluations"),
        pytest.param({"ignore_messages_seconds": 60}, id="during a long evaluation"),
        pytest.param({"export_seconds": 60}, id="during the export"),
    ],
)
def test_worker_is_free_within_a_second(tmp_path: Path, orders: dict[str, object]) -> None:
    seconds: list[float] = []
    with run_service(tmp_path / "store", tmp_path / "log", WITH_SUBPROCESS) as service:
        for number in range(REPEATS):
            job = service.http.post(URL, content=fake_scan(**orders, number=number)).json()["id"]
            wait_for_state(service.http, job, "running")
            folder = tmp_path / "store" / "jobs" / job
            wait_for_work_folder(folder, exists=True)
            time.sleep(0.2 + 0.07 * number)  # at different times between two checks of the worker
            start = time.monotonic()
            assert service.http.post(f"{URL}/{job}/cancel").status_code == 200
            seconds.append(wait_for_work_folder(folder, exists=False) - start)
            assert [path.name for path in folder.iterdir()] == ["scan"]
            if seconds[-1] < SECOND:
                break
        assert send(service.http, name="next").status_code == 200
    assert min(seconds) < BUSY_FACTOR * SECOND, seconds
