"""A database or a store that hangs: callers get 503, and the other routes answer."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from app.api.dependencies import ThreadGroup
from tests.api.support import URL, WAIT, fake_scan, send, send_running


@pytest.fixture
def hanging(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Make the database hang until the event is set."""
    services = client.app.state.services  # type: ignore[attr-defined]
    release = threading.Event()

    def hang(*_: object) -> None:
        release.wait(60)

    monkeypatch.setattr(services.calls._queries, "_seconds", 0.3)
    monkeypatch.setattr(services.calls._probes, "_seconds", 0.3)
    for name in ("get", "list_jobs", "check_capacity", "count_workers", "metrics", "read_states"):
        monkeypatch.setattr(services.queue, name, hang)
    yield release
    release.set()


def test_hanging_database_is_503_and_the_process_lives(client: TestClient, hanging: threading.Event) -> None:
    assert not hanging.is_set()
    start = time.monotonic()
    # More calls than threads.
    for path in [URL] * 30 + ["/readyz", "/metrics", f"{URL}/x", f"{URL}/x/events"]:
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable"), path
        assert int(answer.headers["retry-after"]) > 0
    assert client.post(URL, content=fake_scan(name="hanging")).status_code == 503
    assert client.get("/livez").status_code == 200
    assert client.get("/v1/models").status_code == 200
    assert time.monotonic() - start < 60


def test_database_error_is_503(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise sa.exc.OperationalError("SELECT geheim", {}, Exception("geheim"))

    monkeypatch.setattr(client.app.state.services.queue, "list_jobs", fail)  # type: ignore[attr-defined]
    answer = client.get(URL)
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    assert "geheim" not in answer.text


def test_submission_that_hangs_removes_its_files_when_it_ends(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread may still move the files: nobody removes them under it."""
    services = client.app.state.services  # type: ignore[attr-defined]
    release = threading.Event()
    submit = services.queue.submit

    def slow(*arguments: Any) -> object:
        release.wait(60)
        return submit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(services.calls._transfers, "_seconds", 0.3)
        patch.setattr(services.queue, "submit", slow)
        answer = client.post(URL, content=fake_scan(name="slow"))
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        assert len(list((services.store.root / "incoming").iterdir())) == 1
        release.set()
    deadline = time.monotonic() + 60
    while list((services.store.root / "incoming").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert send(client, name="slow").status_code == 200
    assert not list((services.store.root / "incoming").iterdir())


def test_event_streams_and_waiting_callers_are_limited(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    follower = client.app.state.services.follower  # type: ignore[attr-defined]
    job = send_running(client, name="followed by many")
    monkeypatch.setattr(follower, "_limit", 0)
    refused = client.get(f"{URL}/{job}/events")
    assert (refused.status_code, refused.json()["code"]) == (503, "too_many_streams")
    waiting = client.post(URL, content=fake_scan(name="not waited for"), headers=WAIT)
    assert (waiting.status_code, "preference-applied" in waiting.headers) == (202, False)
    assert waiting.headers["location"]
    client.delete(f"{URL}/{job}")


def test_all_followers_share_one_query(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = client.app.state.services.queue  # type: ignore[attr-defined]
    job = send(client, wait=False, seconds=2, name="shared").json()["id"]
    polls: list[set[str]] = []
    read_states = queue.read_states

    def count(jobs: set[str]) -> object:
        polls.append(set(jobs))
        return read_states(jobs)

    monkeypatch.setattr(queue, "read_states", count)
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(client.get(f"{URL}/{job}/events").text)) for _ in range(8)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(text.rstrip().splitlines()[-2] == "event: end" for text in texts)
    assert len(polls) < 8 + 8 * (time.monotonic() - start)


def test_group_of_threads_leaves_abandoned_calls_out() -> None:
    release = threading.Event()
    done: list[str] = []

    async def use() -> None:
        group = ThreadGroup("test", 1, 0.2)
        with pytest.raises(TimeoutError):
            await group.run(release.wait, 30)
        with pytest.raises(TimeoutError):
            await group.run(done.append, "never")
        release.set()
        await group.run(done.append, "later")
        with pytest.raises(ZeroDivisionError):
            await group.run(lambda: 1 // 0)

    asyncio.run(use())
    assert done == ["later"]
