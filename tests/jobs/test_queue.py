import sqlite3
from datetime import timedelta
from pathlib import Path

import pytest

from app.errors import NotFound, QueueFull
from app.jobs.job import Cursor, JobFilter
from app.jobs.store import Store
from tests.api.support import FakeEngine
from tests.jobs.support import running_service, submit, wait_for_state


def analysed_jobs(engine: FakeEngine) -> list[str]:
    """Return the jobs in the order of their inference."""
    return [path.parts[-3] for path, _ in engine.inferences]


def test_failed_commit_creates_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_error(*_: object) -> None:
        raise OSError

    with running_service(tmp_path, FakeEngine()) as service:
        monkeypatch.setattr(Store, "commit_upload", raise_error)
        with pytest.raises(OSError, match=r"^$"):
            submit(service, tmp_path)
        assert service.queue.list_jobs(JobFilter(), 10, None) == []


def test_queue_is_first_in_first_out_and_pages_are_complete(tmp_path: Path) -> None:
    engine = FakeEngine()
    with running_service(tmp_path, engine, queue_limit=30) as service:
        queue = service.queue
        first = submit(service, tmp_path, seconds=60)
        wait_for_state(service, first, "running")
        # More than a page of jobs in one second, which is the resolution of SQLite's clock.
        waiting = [submit(service, tmp_path, name=i) for i in range(30)]
        assert [queue.positions()[job] for job in waiting] == list(range(1, 31))
        with pytest.raises(QueueFull):
            queue.check_capacity(0)
        # The limit also holds for uploads that began earlier. A waiting job is still found by its content.
        with pytest.raises(QueueFull):
            submit(service, tmp_path, name="too late")
        assert submit(service, tmp_path, name=0) == waiting[0]

        listed: list[str] = []
        after = None
        while page := queue.list_jobs(JobFilter(("queued",)), 4, after):
            listed += [job.id for job in page]
            after = Cursor(page[-1].created, page[-1].id)
        assert sorted(listed) == sorted(waiting)

        queue.erase(first)
        wait_for_state(service, waiting[-1], "succeeded")
        assert analysed_jobs(engine) == [first, *waiting]
        with pytest.raises(NotFound):
            queue.get(first)


def test_job_of_a_dead_worker_goes_behind_the_others(tmp_path: Path) -> None:
    engine = FakeEngine()
    with running_service(tmp_path, engine) as service:
        first = submit(service, tmp_path, seconds=60)
        wait_for_state(service, first, "running")
        suspect, other = submit(service, tmp_path, name="suspect"), submit(service, tmp_path, name="other")
        service._registry.lower_priority([suspect])
        service._registry.lower_priority([suspect])
        assert service.queue.positions() == {other: 1, suspect: 2}
        assert service.queue.get(suspect).priority == "routine"
        service.queue.erase(first)
        wait_for_state(service, suspect, "succeeded")
        assert analysed_jobs(engine) == [first, other, suspect]


def test_filters_select_models_codes_and_times(tmp_path: Path) -> None:
    with running_service(tmp_path, FakeEngine()) as service:
        good, bad = submit(service, tmp_path), submit(service, tmp_path, raise_error="OutOfDistribution")
        wait_for_state(service, good, "succeeded")
        wait_for_state(service, bad, "failed")
        created = service.queue.get(good).created
        hour = timedelta(hours=1)

        def select(job_filter: JobFilter) -> set[str]:
            return {job.id for job in service.queue.list_jobs(job_filter, 10, None)}

        for model, expected in (("tiny", {good}), ("tiny-0.0.1", {good}), ("tin", set()), ("tiny-0.0.2", set())):
            assert select(JobFilter(model=model)) == expected
        assert select(JobFilter(code="out_of_distribution")) == {bad}
        assert select(JobFilter(states=("succeeded",), code="out_of_distribution")) == set()
        assert select(JobFilter(priority="routine")) == {good, bad}
        service._registry.lower_priority([bad])
        assert select(JobFilter(priority="routine")) == {good, bad}
        assert select(JobFilter(priority="stat")) == set()
        assert select(JobFilter(created_after=created - hour, created_before=created + hour)) == {good, bad}
        assert select(JobFilter(created_after=created + hour)) == select(JobFilter(created_before=created)) == set()
        assert good in select(JobFilter(created_after=created))


def test_erased_job_leaves_no_trace_in_the_database(tmp_path: Path) -> None:
    with running_service(tmp_path, FakeEngine()) as service:
        succeeded, failed = (
            submit(service, tmp_path, name="done"),
            submit(service, tmp_path, raise_error="OutOfDistribution"),
        )
        wait_for_state(service, succeeded, "succeeded")
        wait_for_state(service, failed, "failed")
        running = submit(service, tmp_path, seconds=60)
        wait_for_state(service, running, "running")
        service._registry.record_crash("a worker", [running])
        erased = [succeeded, failed, running, submit(service, tmp_path, name="waiting")]
        for job in erased:
            service.queue.erase(job)
        kept = submit(service, tmp_path, name="kept")
        wait_for_state(service, kept, "succeeded")  # so the worker has stopped the running job
        service.enforce_retention()  # truncates the log again, in case somebody was reading
        write_ahead_log = (tmp_path / "jobs.sqlite-wal").read_bytes()
        assert [job for job in erased if job.encode() in write_ahead_log] == []
    with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
        rows = "\n".join(database.iterdump())
    assert kept in rows
    assert [job for job in erased if job in rows] == []
