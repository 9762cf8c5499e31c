import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from dbos import DBOS

from app.analysis import AnalysisRequest
from app.errors import NotFound, QueueFull
from app.jobs.engine import Engine
from app.jobs.job import Cursor, State, Which
from app.jobs.metrics import Metrics
from app.jobs.retention import Limits
from app.jobs.roster import DEATHS
from app.jobs.runner import Interrupted
from app.jobs.store import STALE_SECONDS, Store
from app.jobs.workflow import Jobs
from tests.api.support import FakeEngine, scan
from tests.jobs.test_store import fill


@contextmanager
def started(folder: Path, engine: Engine, limit: int = 100) -> Iterator[Jobs]:
    jobs = Jobs(engine, Store(folder), f"sqlite:///{folder}/jobs.sqlite", Metrics(), Limits(queue=limit))
    jobs.start()
    try:
        yield jobs
    finally:
        jobs.stop(0)


def submit(jobs: Jobs, folder: Path, **orders: object) -> str:
    with Store(folder).receive() as incoming:
        incoming.begin()
        incoming.write(scan(**orders))
        incoming.end()
        return jobs.submit(incoming, AnalysisRequest(), None)


def until(jobs: Jobs, job: str, state: State) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if jobs.get(job).state == state:
            return
        time.sleep(0.03)
    raise AssertionError(f"never {state}: {jobs.get(job)}")


def test_a_job_goes_on_after_any_number_of_restarts(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.slow = True
    for begun in range(1, DEATHS + 3):
        with started(tmp_path, engine) as jobs:
            job = submit(jobs, tmp_path)
            while len(engine.seen) < begun:
                time.sleep(0.01)
    engine.slow = False
    with started(tmp_path, engine) as jobs:
        until(jobs, job, "succeeded")
        assert jobs.get(job).model == "tiny-0.0.1"
        assert jobs.page(Which(), 10, None) == [jobs.get(job)]


def test_what_was_analysed_before_a_death_is_only_published_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, died = FakeEngine(), threading.Event()

    def die(*_: object) -> None:
        died.set()
        raise Interrupted

    with monkeypatch.context() as broken, started(tmp_path, engine) as jobs:
        broken.setattr(Store, "publish", die)
        job = submit(jobs, tmp_path)
        assert died.wait(120)
    assert Store(tmp_path).read(job, "mask.nii.gz") is None
    with started(tmp_path, engine) as jobs:
        until(jobs, job, "succeeded")
    assert Store(tmp_path).read(job, "mask.nii.gz") == b"mask.nii.gz" * 10
    assert len(engine.seen) == 1


def test_a_scan_that_could_not_be_kept_is_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError

    with started(tmp_path, FakeEngine()) as jobs:
        monkeypatch.setattr(Store, "keep", fail)
        with pytest.raises(OSError, match=r"^$"):
            submit(jobs, tmp_path)
        assert jobs.page(Which(), 10, None) == []


def test_an_erased_job_has_no_row_left(tmp_path: Path) -> None:
    with started(tmp_path, FakeEngine()) as jobs:
        ended = [submit(jobs, tmp_path, name="done"), submit(jobs, tmp_path, fail="OutOfDistribution")]
        until(jobs, ended[0], "succeeded")
        until(jobs, ended[1], "failed")
        running = submit(jobs, tmp_path, seconds=60)
        until(jobs, running, "running")
        jobs._roster.lost("a worker", [running])
        erased = [*ended, running, submit(jobs, tmp_path, name="waiting")]
        for job in erased:
            jobs.erase(job)
        kept = submit(jobs, tmp_path, name="kept")
        until(jobs, kept, "succeeded")  # so the worker has let go of the running one
        jobs.retain()  # which looks again, where somebody read as they were erased
        written_ahead = (tmp_path / "jobs.sqlite-wal").read_bytes()
        assert [job for job in erased if job.encode() in written_ahead] == []
    with sqlite3.connect(tmp_path / "jobs.sqlite") as database:
        rows = "\n".join(database.iterdump())
    assert kept in rows
    assert [job for job in erased if job in rows] == []


def test_readers_of_sqlite_do_not_wait_for_writers(tmp_path: Path) -> None:
    with started(tmp_path, FakeEngine()) as jobs, jobs._database.connect() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar_one() == "wal"
        # Nothing is acknowledged before it is on the disk: a commit syncs.
        assert connection.execute(sa.text("PRAGMA synchronous")).scalar_one() == 2


def test_the_queue_is_first_in_first_out_and_pages_hold_a_burst(tmp_path: Path) -> None:
    engine = FakeEngine()
    with started(tmp_path, engine, limit=30) as jobs:
        blocker = submit(jobs, tmp_path, seconds=60)
        until(jobs, blocker, "running")
        # More than a page of them in one second, which is one tick of SQLite's clock.
        sent = [submit(jobs, tmp_path, name=i) for i in range(30)]
        assert [jobs.places()[job] for job in sent] == list(range(1, 31))
        with pytest.raises(QueueFull):
            jobs.check_room(0)
        # Uploads that began before the queue was full make it no longer; what waits in it is still found.
        with pytest.raises(QueueFull):
            submit(jobs, tmp_path, name="too late")
        assert submit(jobs, tmp_path, name=0) == sent[0]

        seen: list[str] = []
        after = None
        while page := jobs.page(Which(("queued",)), 4, after):
            seen += [job.id for job in page]
            after = Cursor(page[-1].created, page[-1].id)
        assert sorted(seen) == sorted(sent)

        jobs.erase(blocker)
        until(jobs, sent[-1], "succeeded")
        order = [path.parts[-3] for path, _ in engine.seen]
        assert order == [blocker, *sent]
        with pytest.raises(NotFound):
            jobs.get(blocker)


def test_a_scan_that_lost_its_worker_goes_behind_the_others(tmp_path: Path) -> None:
    engine = FakeEngine()
    with started(tmp_path, engine) as jobs:
        blocker = submit(jobs, tmp_path, seconds=60)
        until(jobs, blocker, "running")
        suspect, other = submit(jobs, tmp_path, name="suspect"), submit(jobs, tmp_path, name="other")
        jobs._roster.demote([suspect])
        jobs._roster.demote([suspect])
        assert jobs.places() == {other: 1, suspect: 2}
        assert jobs.get(suspect).priority == "routine"
        jobs.erase(blocker)
        until(jobs, suspect, "succeeded")
        assert [path.parts[-3] for path, _ in engine.seen] == [blocker, other, suspect]


def test_what_a_dead_worker_held_is_taken_back_once(tmp_path: Path) -> None:
    engine = FakeEngine()
    with started(tmp_path, engine) as jobs:
        job = submit(jobs, tmp_path, seconds=60)
        until(jobs, job, "running")
        (holder,) = jobs.holders()
        assert jobs.take_back("somebody else") == []
        assert jobs.wanted(job)
        assert jobs.take_back(holder) == [job]
        # This worker is not dead, only taken for it: it lets go, and, there being no other, begins again.
        while len(engine.seen) < 2:
            time.sleep(0.05)
        assert jobs.holders() == {holder}
        assert jobs._roster.blamed(job) == 0


def test_an_upload_that_never_became_a_job_is_swept_after_a_day(tmp_path: Path) -> None:
    """The process died between `Store.keep` and the row: nobody was told that the scan was taken."""
    store, gone, fresh = Store(tmp_path), "0" * 16 + "-" + "1" * 16, "0" * 16 + "-" + "2" * 16
    with started(tmp_path, FakeEngine()) as jobs:
        blocker = submit(jobs, tmp_path, seconds=60)
        until(jobs, blocker, "running")
        waiting = submit(jobs, tmp_path, name="waits for more than a day")
        for job in (gone, fresh):
            fill(store, job, b"scan")
        long_ago = time.time() - STALE_SECONDS - 60
        for job in (gone, waiting):
            os.utime(tmp_path / "jobs" / job, (long_ago, long_ago))
        assert sorted(store.unclaimed(time.time() - STALE_SECONDS)) == sorted([gone, waiting])
        jobs._sweep()
        assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == sorted([fresh, waiting, blocker])
        jobs.erase(blocker)
        until(jobs, waiting, "succeeded")
        # Whose row is missing and who yet has results was not forgotten by a process: the database was.
        DBOS.delete_workflow(waiting)
        os.utime(tmp_path / "jobs" / waiting, (long_ago, long_ago))
        jobs._sweep()
        assert store.read(waiting, "mask.nii.gz")


def test_the_list_knows_models_codes_and_times(tmp_path: Path) -> None:
    with started(tmp_path, FakeEngine()) as jobs:
        good, bad = submit(jobs, tmp_path), submit(jobs, tmp_path, fail="OutOfDistribution")
        until(jobs, good, "succeeded")
        until(jobs, bad, "failed")
        created = jobs.get(good).created
        hour = timedelta(hours=1)

        def ids(which: Which) -> set[str]:
            return {job.id for job in jobs.page(which, 10, None)}

        for model, expected in (("tiny", {good}), ("tiny-0.0.1", {good}), ("tin", set()), ("tiny-0.0.2", set())):
            assert ids(Which(model=model)) == expected
        assert ids(Which(code="out_of_distribution")) == {bad}
        assert ids(Which(states=("succeeded",), code="out_of_distribution")) == set()
        assert ids(Which(priority="routine")) == {good, bad}
        jobs._roster.demote([bad])
        assert ids(Which(priority="routine")) == {good, bad}
        assert ids(Which(priority="stat")) == set()
        assert ids(Which(created_after=created - hour, created_before=created + hour)) == {good, bad}
        assert ids(Which(created_after=created + hour)) == ids(Which(created_before=created)) == set()
        assert good in ids(Which(created_after=created))
