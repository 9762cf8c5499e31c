from pathlib import Path

import pytest

from app.jobs.roster import DEATHS, DEATHS_AT_MOST, LEASE_SECONDS, Roster, Watch

A, B, C = "job-a", "job-b", "job-c"


@pytest.fixture
def roster(tmp_path: Path) -> Roster:
    made = Roster(f"sqlite:///{tmp_path}/jobs.sqlite")
    made.create()
    made.create()  # as a second process does
    return made


def test_a_worker_beats_and_leaves(roster: Roster) -> None:
    for _ in range(3):
        roster.beat("w")
    roster.beat("v")
    assert roster.beats() == {"w": 2, "v": 0}
    roster.leave("w")
    assert roster.beats() == {"v": 0}


def test_a_scan_is_blamed_at_its_second_worker_and_not_for_one_death_twice(roster: Roster) -> None:
    roster.lost("w1", [A])
    roster.lost("w1", [A])  # noticed by two processes
    assert roster.blamed(A) == 0
    roster.lost("w2", [A])
    assert roster.blamed(A) == DEATHS
    roster.forget(A)
    assert roster.blamed(A) == 0


def test_where_others_lose_their_workers_too_the_machine_is_to_blame_for_a_while(roster: Roster) -> None:
    roster.lost("w0", [B])
    for death in range(DEATHS_AT_MOST - 1):
        roster.lost(f"w{death + 1}", [A])
        assert roster.blamed(A) == 0
    roster.lost("w9", [A])
    assert roster.blamed(A) == DEATHS_AT_MOST
    # Its guilt settled, it is no excuse for the next.
    roster.forget(A)
    roster.forget(B)
    for death in range(DEATHS):
        roster.lost(f"x{death}", [C])
    assert roster.blamed(C) == DEATHS


def test_only_who_stands_still_is_dead() -> None:
    watch = Watch()
    assert watch.dead({"beats": 0, "still": 5, "no row": -1}, 0) == []
    assert watch.dead({"beats": 1, "still": 5, "no row": -1}, LEASE_SECONDS / 2) == []
    assert watch.dead({"beats": 1, "still": 5, "no row": -1, "new": 0}, LEASE_SECONDS + 1) == ["still", "no row"]
    # Struck off, and back again: it was only slow.
    assert watch.dead({"beats": 2}, LEASE_SECONDS + 2) == []
    assert watch.dead({"beats": 2, "still": 6}, LEASE_SECONDS * 1.5) == []
