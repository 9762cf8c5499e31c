from pathlib import Path

import pytest

from app.jobs.database import connect
from app.jobs.recovery import DEATHS, DEATHS_AT_MOST, LEASE_SECONDS, HeartbeatMonitor, WorkerRegistry

A, B, C = "job-a", "job-b", "job-c"


@pytest.fixture
def roster(tmp_path: Path) -> WorkerRegistry:
    made = WorkerRegistry(connect(f"sqlite:///{tmp_path}/jobs.sqlite"))
    made.create()
    made.create()  # as a second process does
    return made


def test_a_worker_beats_and_leaves(roster: WorkerRegistry) -> None:
    for _ in range(3):
        roster.beat("w")
    roster.beat("v")
    assert roster.beats() == {"w": 2, "v": 0}
    roster.leave("w")
    assert roster.beats() == {"v": 0}


def test_a_scan_is_blamed_at_the_second_death_that_was_seen(roster: WorkerRegistry) -> None:
    roster.killed("w1", A)
    assert roster.blamed(A) == 0
    roster.killed("w1", A)
    assert roster.blamed(A) == DEATHS
    roster.forget(A)
    assert roster.blamed(A) == 0
    # One that took its worker with it is tried under guard, and then seen.
    roster.lost("w1", [B])
    assert roster.blamed(B) == 0
    roster.killed("w2", B)
    assert roster.blamed(B) == DEATHS


def test_a_scan_is_not_blamed_for_workers_that_were_killed_with_it(roster: WorkerRegistry) -> None:
    for death in range(DEATHS_AT_MOST - 1):
        roster.lost(f"w{death}", [A, C])
        roster.lost(f"w{death}", [A])  # noticed by two processes
        assert roster.deaths(A) == death + 1
        assert roster.blamed(A) == 0
    roster.lost("the last", [A])
    assert (roster.blamed(A), roster.blamed(C)) == (DEATHS_AT_MOST, 0)


def test_only_who_stands_still_is_dead() -> None:
    watch = HeartbeatMonitor()
    assert watch.dead({"beats": 0, "still": 5, "no row": -1}, 0) == []
    assert watch.dead({"beats": 1, "still": 5, "no row": -1}, LEASE_SECONDS / 2) == []
    assert watch.dead({"beats": 1, "still": 5, "no row": -1, "new": 0}, LEASE_SECONDS + 1) == ["still", "no row"]
    # Struck off, and back again: it was only slow.
    assert watch.dead({"beats": 2}, LEASE_SECONDS + 2) == []
    assert watch.dead({"beats": 2, "still": 6}, LEASE_SECONDS * 1.5) == []
