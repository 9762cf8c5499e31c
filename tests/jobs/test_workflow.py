import os
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from dbos import DBOS

from app.jobs.job import JobFilter
from app.jobs.maintenance import MAX_CRASHES
from app.jobs.store import STALE_SECONDS, Store
from app.jobs.worker import Interrupted
from tests.api.support import FakeEngine
from tests.jobs.support import commit_scan, running_service, submit, wait_for_state


def test_job_continues_after_any_number_of_restarts(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.is_slow = True
    for starts in range(1, MAX_CRASHES + 3):
        with running_service(tmp_path, engine) as service:
            job = submit(service, tmp_path)
            while len(engine.inferences) < starts:
                time.sleep(0.01)
    engine.is_slow = False
    with running_service(tmp_path, engine) as service:
        wait_for_state(service, job, "succeeded")
        assert service.queue.get(job).model == "tiny-0.0.1"
        assert service.queue.list_jobs(JobFilter(), 10, None) == [service.queue.get(job)]


def test_results_exported_before_a_crash_are_published_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, crashed = FakeEngine(), threading.Event()

    def raise_interrupted(*_: object) -> None:
        crashed.set()
        raise Interrupted

    with monkeypatch.context() as patch, running_service(tmp_path, engine) as service:
        patch.setattr(Store, "publish", raise_interrupted)
        job = submit(service, tmp_path)
        assert crashed.wait(120)
    assert Store(tmp_path).read(job, "mask.nii.gz") is None
    with running_service(tmp_path, engine) as service:
        wait_for_state(service, job, "succeeded")
    assert Store(tmp_path).read(job, "mask.nii.gz") == b"mask.nii.gz" * 10
    assert len(engine.inferences) == 1


def test_sqlite_syncs_each_commit_and_does_not_block_readers(tmp_path: Path) -> None:
    with running_service(tmp_path, FakeEngine()) as service, service._database.connect() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar_one() == "wal"
        assert connection.execute(sa.text("PRAGMA synchronous")).scalar_one() == 2


def test_orphaned_upload_is_removed_after_a_day(tmp_path: Path) -> None:
    """The process died between `Store.commit_upload` and the row, so the upload was never acknowledged."""
    store, orphan, fresh = Store(tmp_path), "0" * 16 + "-" + "1" * 16, "0" * 16 + "-" + "2" * 16
    with running_service(tmp_path, FakeEngine()) as service:
        running = submit(service, tmp_path, seconds=60)
        wait_for_state(service, running, "running")
        waiting = submit(service, tmp_path, name="waits for more than a day")
        for job in (orphan, fresh):
            commit_scan(store, job, b"scan")
        long_ago = time.time() - STALE_SECONDS - 60
        for job in (orphan, waiting):
            os.utime(tmp_path / "jobs" / job, (long_ago, long_ago))
        assert sorted(store.orphaned(time.time() - STALE_SECONDS)) == sorted([orphan, waiting])
        service._remove_orphaned_uploads()
        assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == sorted([fresh, waiting, running])
        service.queue.erase(running)
        wait_for_state(service, waiting, "succeeded")
        # A job with results but no row is kept, because the database was replaced.
        DBOS.delete_workflow(waiting)
        os.utime(tmp_path / "jobs" / waiting, (long_ago, long_ago))
        service._remove_orphaned_uploads()
        assert store.read(waiting, "mask.nii.gz")
