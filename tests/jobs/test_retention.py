from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.errors import NotFound
from app.jobs.job import Job
from app.jobs.retention import GIGABYTE, StorageLimits, select_expired
from tests.api.support import FakeEngine
from tests.jobs.support import running_service, submit, wait_for_state

NOW = datetime(2026, 11, 23, tzinfo=UTC)


def ended_job(name: str, days: float) -> Job:
    at = NOW - timedelta(days=days)
    return Job(name, "succeeded", None, 1.0, None, at - timedelta(hours=1), at, at, None, "")


JOBS = [ended_job("old", 40), ended_job("middle", 20), ended_job("young", 1)]
SIZES = {"old": 3 * GIGABYTE, "middle": 2 * GIGABYTE, "young": GIGABYTE, "running": GIGABYTE}


@pytest.mark.parametrize(
    ("limits", "expired"),
    [
        (StorageLimits(), []),
        (StorageLimits(keep_days=30), ["old"]),
        (StorageLimits(keep_days=0.5), ["old", "middle", "young"]),
        (StorageLimits(keep_gb=7), []),
        (StorageLimits(keep_gb=6), ["old"]),
        (StorageLimits(keep_gb=3), ["old", "middle"]),
        (StorageLimits(keep_gb=0.1), ["old", "middle", "young"]),  # a running job is kept
        (StorageLimits(keep_days=30, keep_gb=3), ["old", "middle"]),
    ],
)
def test_oldest_ended_jobs_expire_first(limits: StorageLimits, expired: list[str]) -> None:
    assert select_expired(JOBS, SIZES, limits, NOW) == expired


def test_age_counts_from_the_end_of_the_job() -> None:
    waited_long = replace(ended_job("waited long", 1), created=NOW - timedelta(days=90))
    assert select_expired([waited_long], {}, StorageLimits(keep_days=30), NOW) == []


def test_expired_job_is_erased_completely(tmp_path: Path) -> None:
    with running_service(tmp_path, FakeEngine()) as service:
        job = submit(service, tmp_path)
        wait_for_state(service, job, "succeeded")
        service.enforce_retention()
        service.queue.get(job)
        service._limits = StorageLimits(keep_gb=1e-9)
        service.enforce_retention()
        with pytest.raises(NotFound):
            service.queue.get(job)
    assert not list(tmp_path.rglob(f"*{job}*"))
