from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.errors import NotFound
from app.jobs.job import Job
from app.jobs.retention import GIGABYTE, StorageLimits, select_expired
from tests.api.support import FakeEngine
from tests.jobs.test_workflow import started, submit, until

NOW = datetime(2026, 11, 23, tzinfo=UTC)


def ended(name: str, days: float) -> Job:
    at = NOW - timedelta(days=days)
    return Job(name, "succeeded", None, 1.0, None, at - timedelta(hours=1), at, at, None, "")


JOBS = [ended("old", 40), ended("middle", 20), ended("young", 1)]
SIZES = {"old": 3 * GIGABYTE, "middle": 2 * GIGABYTE, "young": GIGABYTE, "running": GIGABYTE}


@pytest.mark.parametrize(
    ("limits", "erased"),
    [
        (StorageLimits(), []),
        (StorageLimits(keep_days=30), ["old"]),
        (StorageLimits(keep_days=0.5), ["old", "middle", "young"]),
        (StorageLimits(keep_gb=7), []),
        (StorageLimits(keep_gb=6), ["old"]),
        (StorageLimits(keep_gb=3), ["old", "middle"]),
        (StorageLimits(keep_gb=0.1), ["old", "middle", "young"]),  # what has not ended is kept
        (StorageLimits(keep_days=30, keep_gb=3), ["old", "middle"]),
    ],
)
def test_the_oldest_that_ended_go_first(limits: StorageLimits, erased: list[str]) -> None:
    assert select_expired(JOBS, SIZES, limits, NOW) == erased


def test_what_waited_long_is_not_old() -> None:
    late = replace(ended("late", 1), created=NOW - timedelta(days=90))
    assert select_expired([late], {}, StorageLimits(keep_days=30), NOW) == []


def test_what_is_kept_too_long_leaves_no_trace(tmp_path: Path) -> None:
    with started(tmp_path, FakeEngine()) as jobs:
        kept = submit(jobs, tmp_path)
        until(jobs, kept, "succeeded")
        jobs.retain()
        jobs.get(kept)
        jobs._limits = StorageLimits(keep_gb=1e-9)
        jobs.retain()
        with pytest.raises(NotFound):
            jobs.get(kept)
    assert not list(tmp_path.rglob(f"*{kept}*"))
