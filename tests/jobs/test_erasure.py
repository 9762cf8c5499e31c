"""Erasure and cancellation: nothing of the patient stays, even if the store, the database or the process fails."""

import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.errors import NotFound, StoreUnavailable
from app.jobs.queue import JobQueue
from app.jobs.store import Store
from app.jobs.workflow import JobService
from tests.api.support import FakeEngine
from tests.jobs.support import running_service, submit, wait_for_state

FULL_DATABASE = sa.exc.OperationalError("DELETE", {}, Exception("database or disk is full"))
DEAD_STORE = StoreUnavailable("Found.", expected="expected.", advice="Advice.")


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.maintenance.HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr("app.jobs.maintenance.ERASURE_SECONDS", 0.2)


def raise_error(error: Exception):  # type: ignore[no-untyped-def]
    def call(*_: object) -> None:
        raise error

    return call


def wait_until_erased(service: JobService, folder: Path, job: str) -> None:
    """Wait until neither the database nor the store knows a job."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            service.queue.get(job)
        except NotFound:
            if not list(folder.rglob(f"*{job}*")):
                return
        time.sleep(0.05)
    raise AssertionError("not erased in time")


def test_erasure_that_cannot_begin_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_service(tmp_path, FakeEngine()) as service:
        job = submit(service, tmp_path)
        wait_for_state(service, job, "succeeded")
        with monkeypatch.context() as patch:
            patch.setattr(Store, "begin_erasure", raise_error(DEAD_STORE))
            with pytest.raises(StoreUnavailable):
                service.queue.erase(job)
        assert service.queue.get(job).state == "succeeded"
        assert Store(tmp_path).read(job, "mask.nii.gz")


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (JobQueue, "_delete_rows", FULL_DATABASE),
        (Store, "clear_erased", DEAD_STORE),
        (Store, "finish_erasure", DEAD_STORE),
    ],
)
def test_interrupted_erasure_is_finished_later(
    owner: type, name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_service(tmp_path, FakeEngine()) as service:
        job = submit(service, tmp_path)
        wait_for_state(service, job, "succeeded")
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raise_error(error))
            with pytest.raises(type(error)):
                service.queue.erase(job)
            assert not (tmp_path / "jobs" / job).exists()
            assert service._store.sizes() == {}
        wait_until_erased(service, tmp_path, job)


def test_erasure_is_finished_after_the_process_died(tmp_path: Path) -> None:
    with running_service(tmp_path, FakeEngine()) as service:
        jobs = [submit(service, tmp_path, name=number) for number in range(2)]
        for job in jobs:
            wait_for_state(service, job, "succeeded")
    Store(tmp_path).begin_erasure(jobs[0])
    with running_service(tmp_path, FakeEngine()) as service:
        wait_until_erased(service, tmp_path, jobs[0])
        assert service.queue.get(jobs[1]).state == "succeeded"


def test_full_disk_is_freed_before_the_row_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delete_rows = JobQueue._delete_rows

    def delete_if_free(queue: JobQueue, job: str) -> None:
        if any(path.is_file() for path in (tmp_path / "trash").rglob("*")):
            raise FULL_DATABASE
        delete_rows(queue, job)

    with running_service(tmp_path, FakeEngine()) as service:
        job = submit(service, tmp_path)
        wait_for_state(service, job, "succeeded")
        monkeypatch.setattr(JobQueue, "_delete_rows", delete_if_free)
        service.queue.erase(job)
        with pytest.raises(NotFound):
            service.queue.get(job)
        assert not list(tmp_path.rglob(f"*{job}*"))


def test_followers_of_an_erased_job_never_see_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker misses the files of its job before the row is gone."""
    delete_rows = JobQueue._delete_rows

    def delete_late(queue: JobQueue, job: str) -> None:
        time.sleep(1)
        delete_rows(queue, job)

    with running_service(tmp_path, FakeEngine()) as service:
        job = submit(service, tmp_path, seconds=0.5)
        wait_for_state(service, job, "running")
        monkeypatch.setattr(JobQueue, "_delete_rows", delete_late)
        thread = threading.Thread(target=service.queue.erase, args=(job,))
        thread.start()
        states = set()
        while thread.is_alive():
            try:
                states.add(service.queue.get(job).state)
            except NotFound:
                break
            time.sleep(0.02)
        thread.join()
        assert states == {"running"}
        wait_until_erased(service, tmp_path, job)
        assert service.health.fault is None


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("store_answers", [True, False])
def test_job_cancelled_while_it_is_published_keeps_no_results(
    when: str,
    store_answers: bool,  # noqa: FBT001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish = Store.publish
    with running_service(tmp_path, FakeEngine()) as service:

        def cancel(job: str) -> None:
            with monkeypatch.context() as patch:
                if not store_answers:
                    patch.setattr(Store, "discard_all_but_scan", raise_error(DEAD_STORE))
                service.queue.cancel(job)

        def publish_and_cancel(store: Store, job: str, work: str) -> None:
            if when == "before":
                cancel(job)
            publish(store, job, work)
            if when == "after":
                cancel(job)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "publish", publish_and_cancel)
            job = submit(service, tmp_path)
            wait_for_state(service, job, "cancelled")
            last = submit(service, tmp_path, name="last")
            wait_for_state(service, last, "cancelled")
        good = submit(service, tmp_path, name="good")  # so the worker has left the others
        wait_for_state(service, good, "succeeded")
        for each in (job, last):
            assert [path.name for path in (tmp_path / "jobs" / each).iterdir()] == ["scan"]
        assert service.health.fault is None


def test_results_of_a_cancelled_job_are_removed_after_the_process_died(tmp_path: Path) -> None:
    with running_service(tmp_path, FakeEngine()) as service:
        job = submit(service, tmp_path, seconds=60)
        wait_for_state(service, job, "running")
        service.queue.cancel(job)
    results = tmp_path / "jobs" / job / "results"
    results.mkdir()
    with running_service(tmp_path, FakeEngine()) as service:
        deadline = time.monotonic() + 30
        while results.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert service.queue.get(job).state == "cancelled"
