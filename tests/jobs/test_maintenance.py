import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from app.errors import NotFound
from app.jobs import maintenance
from app.jobs.database import connect, step_table, workflow_table
from app.jobs.job import Job
from app.jobs.maintenance import (
    GIGABYTE,
    LEASE_SECONDS,
    MAX_UNCONFIRMED_CRASHES,
    HeartbeatMonitor,
    StorageLimits,
    WorkerRegistry,
    restart_outdated_jobs,
    select_expired,
)
from app.jobs.queue import WORKFLOW
from tests.api.support import FakeEngine
from tests.jobs.support import running_service, submit, wait_for_state

A, B, C = "job-a", "job-b", "job-c"


@pytest.fixture
def registry(tmp_path: Path) -> WorkerRegistry:
    registry = WorkerRegistry(connect(f"sqlite:///{tmp_path}/jobs.sqlite"))
    registry.create_tables()
    registry.create_tables()  # as a second process does
    return registry


def test_heartbeats_are_counted_until_the_worker_is_removed(registry: WorkerRegistry) -> None:
    for _ in range(3):
        registry.send_heartbeat("w")
    registry.send_heartbeat("v")
    assert registry.heartbeats() == {"w": 2, "v": 0}
    registry.remove_worker("w")
    assert registry.heartbeats() == {"v": 0}


def test_scan_is_quarantined_at_the_second_crash_if_one_is_confirmed(registry: WorkerRegistry) -> None:
    registry.record_child_crash("w1", A)
    assert not registry.is_quarantined(A)
    registry.record_child_crash("w1", A)
    assert registry.is_quarantined(A)
    registry.delete_crash_records(A)
    assert not registry.is_quarantined(A)
    registry.record_crash("w1", [B])
    assert not registry.is_quarantined(B)
    registry.record_child_crash("w2", B)
    assert registry.is_quarantined(B)


def test_unconfirmed_crashes_quarantine_a_scan_only_after_many(registry: WorkerRegistry) -> None:
    for number in range(MAX_UNCONFIRMED_CRASHES - 1):
        registry.record_crash(f"w{number}", [A, C])
        registry.record_crash(f"w{number}", [A])  # recorded by two processes
        assert registry.count_crashes(A) == number + 1
        assert not registry.is_quarantined(A)
    registry.record_crash("the last", [A])
    assert registry.is_quarantined(A)
    assert not registry.is_quarantined(C)


def test_worker_without_heartbeat_for_a_lease_is_dead() -> None:
    monitor = HeartbeatMonitor()
    assert monitor.find_dead({"live": 0, "stuck": 5, "no row": -1}, 0) == []
    assert monitor.find_dead({"live": 1, "stuck": 5, "no row": -1}, LEASE_SECONDS / 2) == []
    dead = monitor.find_dead({"live": 1, "stuck": 5, "no row": -1, "new": 0}, LEASE_SECONDS + 1)
    assert dead == ["stuck", "no row"]
    # A slow worker comes back after its row was removed.
    assert monitor.find_dead({"live": 2}, LEASE_SECONDS + 2) == []
    assert monitor.find_dead({"live": 2, "stuck": 6}, LEASE_SECONDS * 1.5) == []


def test_job_of_a_dead_worker_is_requeued_once(tmp_path: Path) -> None:
    engine = FakeEngine()
    with running_service(tmp_path, engine) as service:
        job = submit(service, tmp_path, seconds=60)
        wait_for_state(service, job, "running")
        (worker,) = service.find_busy_workers()
        assert service.requeue_jobs("another worker") == []
        assert service.is_assigned(job)
        assert service.requeue_jobs(worker) == [job]
        # This worker is alive, though. It stops the job and, as the only worker, starts it again.
        while len(engine.inferences) < 2:
            time.sleep(0.05)
        assert service.find_busy_workers() == {worker}
        assert not service._registry.is_quarantined(job)


def test_outdated_jobs_of_live_workers_are_not_restarted(tmp_path: Path) -> None:
    rows = {"of a dead worker": "w1", "of a live worker": "w2", "in the queue": "w2"}
    with running_service(tmp_path, FakeEngine()) as service:
        jobs = {name: submit(service, tmp_path, name=name) for name in rows}
        for job in jobs.values():
            wait_for_state(service, job, "succeeded")
    database = connect(f"sqlite:///{tmp_path}/jobs.sqlite")
    table, steps = workflow_table(database), step_table(database)
    with database.begin() as connection:
        for name, worker in rows.items():
            status = "ENQUEUED" if name == "in the queue" else "PENDING"
            row = table.update().where(table.c.workflow_uuid == jobs[name])
            connection.execute(row.values(status=status, executor_id=worker, application_version="older"))
    assert restart_outdated_jobs(database, WORKFLOW, "2") == [jobs["in the queue"]]
    assert restart_outdated_jobs(database, WORKFLOW, "2", "w1") == [jobs["of a dead worker"]]
    assert restart_outdated_jobs(database, WORKFLOW, "2", "w1") == []
    with database.connect() as connection:
        recorded = {*connection.execute(sa.select(steps.c.workflow_uuid)).scalars()}
        versions = dict(connection.execute(sa.select(table.c.workflow_uuid, table.c.application_version)).all())
    assert recorded == {jobs["of a live worker"]}
    assert {name: versions[job] for name, job in jobs.items()} == {
        "of a dead worker": "2",
        "of a live worker": "older",
        "in the queue": "2",
    }


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


@pytest.mark.parametrize("limits", [StorageLimits(keep_days=1e-8), StorageLimits(keep_gb=1e-9)])
@pytest.mark.parametrize("is_sent", [True, False])
def test_expired_job_is_kept_until_its_results_are_sent_or_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: StorageLimits, *, is_sent: bool
) -> None:
    monkeypatch.setattr(maintenance, "HEARTBEAT_SECONDS", 3600.0)  # the supervisor does not enforce the retention, too
    with running_service(tmp_path, FakeEngine()) as service:
        job, delivered = (submit(service, tmp_path, name=name) for name in ("undelivered", "delivered"))
        for each in (job, delivered):
            wait_for_state(service, each, "succeeded")
        deliveries = service.queue.deliveries
        deliveries.plan(job, [("archive", "report.dcm")])
        service._limits = limits
        for _ in range(2):
            with capture_logs() as logs:
                service.enforce_retention()
            service.queue.get(job)
            assert service._store.scan_files(job)
            events = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
            assert events == ["expired jobs kept until their results are delivered: 1"]
        with pytest.raises(NotFound):
            service.queue.get(delivered)
        claim = deliveries.claim("worker", "archive")
        assert claim is not None
        assert deliveries.record_sent(claim) if is_sent else deliveries.record_failure(claim, "unreachable", 0)
        with capture_logs() as logs:
            service.enforce_retention()
        assert not [entry for entry in logs if entry["log_level"] == "warning"]
        with pytest.raises(NotFound):
            service.queue.get(job)


def test_undelivered_jobs_do_not_push_the_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a PACS that does not answer would cost the results of every other job."""
    monkeypatch.setattr(maintenance, "HEARTBEAT_SECONDS", 3600.0)
    with running_service(tmp_path, FakeEngine()) as service:
        jobs = [submit(service, tmp_path, name=name) for name in ("undelivered", "delivered")]
        for job in jobs:
            wait_for_state(service, job, "succeeded")
        service.queue.deliveries.plan(jobs[0], [("archive", "report.dcm")])
        service._limits = StorageLimits(keep_gb=max(service._store.sizes().values()) / GIGABYTE)
        with capture_logs() as logs:
            service.enforce_retention()
        events = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
        assert events == ["expired jobs kept until their results are delivered: 1"]
        assert sorted(service._store.sizes()) == sorted(jobs)
        service.queue.erase(jobs[0])  # a caller's erasure does not wait for the delivery
        assert service.queue.deliveries.of_job(jobs[0]) == []
