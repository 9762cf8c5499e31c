import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.analyse import Request
from app.errors import NotFound, QueueFull
from app.jobs.job import Cursor, State
from app.jobs.metrics import Metrics
from app.jobs.retention import Limits
from app.jobs.roster import DEATHS_AT_MOST
from app.jobs.store import Store
from app.jobs.workflow import Jobs
from tests.api.support import FakeEngine, scan


@contextmanager
def started(folder: Path, engine: FakeEngine, limit: int = 100) -> Iterator[Jobs]:
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
        return jobs.submit(incoming, Request(), None)


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
    for begun in range(1, DEATHS_AT_MOST + 2):
        with started(tmp_path, engine) as jobs:
            job = submit(jobs, tmp_path)
            while len(engine.seen) < begun:
                time.sleep(0.01)
    engine.slow = False
    with started(tmp_path, engine) as jobs:
        until(jobs, job, "succeeded")
        assert jobs.get(job).model == "tiny-0.0.1"
        assert jobs.page([], 10, None) == [jobs.get(job)]


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

        seen: list[str] = []
        after = None
        while page := jobs.page(["queued"], 4, after):
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
