"""Deliveries in the database: plan, claim, outcome, retry, erasure, and the step of the job that plans them."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.jobs import deliveries as module
from app.jobs.database import connect
from app.jobs.deliveries import RETRY_SECONDS, Claim, Deliveries
from app.jobs.maintenance import StorageLimits
from app.jobs.metrics import Metrics
from app.jobs.store import Store
from app.jobs.workflow import JobHooks, JobService
from tests.api.support import FakeEngine
from tests.jobs.support import problem_of, submit, wait_for_state

ROUTES = [("archive", "segmentation.dcm"), ("archive", "report.dcm"), ("web", "report.dcm")]
HOUR = 3600.0


@pytest.fixture(params=["sqlite", "postgresql"])
def deliveries(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Deliveries]:
    if request.param == "postgresql":
        database = connect(request.getfixturevalue("database"))
        module.metadata.drop_all(database)
    else:
        database = connect(f"sqlite:///{tmp_path}/jobs.sqlite")
    created = Deliveries(database)
    created.create_table()
    created.create_table()
    yield created
    database.dispose()


def claim(deliveries: Deliveries, target: str = "archive") -> Claim:
    claimed = deliveries.claim("worker", target)
    assert claimed is not None
    return claimed


def test_a_plan_is_idempotent_and_keeps_what_was_sent(deliveries: Deliveries) -> None:
    deliveries.plan("job", ROUTES)
    deliveries.record_sent(claim(deliveries))
    deliveries.plan("job", [*ROUTES, *ROUTES])
    found = deliveries.of_job("job")
    assert [(d.target, d.result, d.state, d.attempts) for d in found] == [
        ("archive", "segmentation.dcm", "sent", 1),
        ("archive", "report.dcm", "pending", 0),
        ("web", "report.dcm", "pending", 0),
    ]
    assert deliveries.count() == {("archive", "sent"): 1, ("archive", "pending"): 1, ("web", "pending"): 1}
    assert deliveries.of_job("other") == []


def test_age_of_the_oldest_pending_delivery(deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr("app.jobs.deliveries.time.time", lambda: now)
    assert deliveries.ages() == {}
    deliveries.plan("first", [("archive", "report.dcm"), ("web", "report.dcm")])
    now += 10
    deliveries.plan("second", [("archive", "report.dcm")])
    deliveries.record_failure(claim(deliveries), "unreachable", HOUR)
    now += 1
    assert deliveries.ages() == pytest.approx({"archive": 11, "web": 11})
    now += RETRY_SECONDS
    deliveries.record_sent(claim(deliveries, "web"))
    for _ in range(2):
        deliveries.record_sent(claim(deliveries))
    assert deliveries.ages() == {"archive": 0, "web": 0}


def test_a_delivery_is_claimed_once(deliveries: Deliveries) -> None:
    deliveries.plan("job", ROUTES)
    assert claim(deliveries).delivery.result == "segmentation.dcm"
    assert claim(deliveries).delivery.result == "report.dcm"
    assert deliveries.claim("worker", "archive") is None
    assert deliveries.claim("worker", ("archive", "web")) is None
    unknown = deliveries.claim("worker", ("archive",))
    assert unknown is not None
    assert unknown.delivery.target == "web"


def test_the_claim_of_a_dead_process_ends(deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch) -> None:
    deliveries.plan("job", ROUTES[:1])
    first = claim(deliveries)
    now = time.time()
    monkeypatch.setattr("app.jobs.deliveries.time.time", lambda: now + module.CLAIM_SECONDS + 1)
    second = claim(deliveries)
    assert not deliveries.record_failure(first, "aborted", HOUR)
    assert not deliveries.record_refusal(first, "no_such_result")
    assert not deliveries.renew(first)
    assert deliveries.record_sent(second)


@pytest.mark.parametrize("outcome", ["failure", "refusal", "sent", "given up before"])
def test_a_success_is_final_even_if_the_claim_has_ended(
    deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    deliveries.plan("job", ROUTES[:1])
    first = claim(deliveries)
    now = time.time() + module.CLAIM_SECONDS + 1
    monkeypatch.setattr("app.jobs.deliveries.time.time", lambda: now)
    second = claim(deliveries)
    attempts = 1
    if outcome == "given up before":
        assert deliveries.record_failure(second, "aborted", 0)
        attempts = 2
    assert deliveries.record_sent(first)
    if outcome == "failure":
        assert not deliveries.record_failure(second, "aborted", HOUR)
    elif outcome == "refusal":
        assert not deliveries.record_refusal(second, "no_such_result")
    else:
        assert not deliveries.record_sent(second)
    deliveries.postpone(second, -1)
    (delivery,) = deliveries.of_job("job")
    assert (delivery.state, delivery.code, delivery.attempts) == ("sent", None, attempts)
    now += 10 * HOUR
    assert deliveries.claim("worker", "archive") is None
    assert deliveries.retry("job") == 0


def test_a_renewed_claim_does_not_end(deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch) -> None:
    deliveries.plan("job", ROUTES[:1])
    first = claim(deliveries)
    now = time.time()
    monkeypatch.setattr("app.jobs.deliveries.time.time", lambda: now)
    for _ in range(3):
        now += module.CLAIM_SECONDS - 1
        assert deliveries.renew(first)
    now += module.CLAIM_SECONDS - 1
    assert deliveries.claim("worker", "archive") is None
    assert deliveries.record_failure(first, "aborted", HOUR)
    assert not deliveries.renew(first)


def test_jobs_with_a_pending_delivery_are_found(deliveries: Deliveries) -> None:
    deliveries.plan("job", ROUTES[:2])
    deliveries.plan("other", ROUTES[2:])
    assert deliveries.find_undelivered() == {"job", "other"}
    deliveries.record_sent(claim(deliveries))
    deliveries.record_refusal(claim(deliveries, "web"), "no_such_result")
    assert deliveries.find_undelivered() == {"job"}
    deliveries.record_sent(claim(deliveries))
    assert deliveries.find_undelivered() == set()


def test_a_new_process_releases_the_claims_of_its_predecessors_only(deliveries: Deliveries) -> None:
    deliveries.plan("job", ROUTES[:2])
    for process in ("machine-1-aa", "machine-10-aa"):
        assert deliveries.claim(process, "archive") is not None
    deliveries.release_claims("machine-1-")
    again = deliveries.claim("machine-1-bb", "archive")
    assert again is not None
    assert again.delivery.result == "segmentation.dcm"
    assert deliveries.claim("machine-1-bb", "archive") is None


def test_attempts_are_spaced_and_given_up(deliveries: Deliveries, monkeypatch: pytest.MonkeyPatch) -> None:
    deliveries.plan("job", ROUTES[:1])
    start = now = time.time()
    monkeypatch.setattr("app.jobs.deliveries.time.time", lambda: now)
    pauses = []
    while (claimed := deliveries.claim("worker", "archive")) is not None:
        assert deliveries.record_failure(claimed, "unreachable", 2 * HOUR)
        (delivery,) = deliveries.of_job("job")
        if delivery.state == "failed":
            break
        assert delivery.next_try is not None
        pauses.append(round(delivery.next_try.timestamp() - now))
        now = delivery.next_try.timestamp() + 0.001
    assert pauses[:9] == [5, 10, 20, 40, 80, 160, 320, 640, 900]
    assert 1.7 * HOUR < now - start < 2 * HOUR
    assert (delivery.code, delivery.next_try, delivery.attempts) == ("unreachable", None, len(pauses) + 1)
    assert deliveries.claim("worker", "archive") is None
    assert deliveries.retry("job") == 1
    (delivery,) = deliveries.of_job("job")
    assert (delivery.state, delivery.attempts, delivery.ended) == ("pending", 0, None)
    assert deliveries.record_sent(claim(deliveries))
    assert deliveries.retry("job") == 0


def test_a_postponed_delivery_has_no_attempt(deliveries: Deliveries) -> None:
    deliveries.plan("job", ROUTES[:1])
    deliveries.postpone(claim(deliveries), -1)
    assert claim(deliveries).delivery.attempts == 0


def test_an_erased_job_has_no_deliveries_and_records_none(deliveries: Deliveries) -> None:
    deliveries.plan("job", ROUTES)
    deliveries.plan("other", ROUTES[:1])
    under_way = claim(deliveries)
    deliveries.erase("job")
    assert not deliveries.record_sent(under_way)
    assert deliveries.of_job("job") == []
    assert len(deliveries.of_job("other")) == 1


def start(folder: Path, seen: list[tuple[str, tuple[str, ...]]]) -> JobService:
    def route(model: str, results: Sequence[str]) -> list[tuple[str, str]]:
        seen.append((model, tuple(results)))
        return [("archive", results[0])]

    hooks = JobHooks(route)
    service = JobService(
        FakeEngine(), Store(folder), f"sqlite:///{folder}/jobs.sqlite", Metrics(), StorageLimits(), hooks
    )
    service.start()
    return service


def test_only_a_succeeded_job_has_deliveries_and_erasing_removes_them(tmp_path: Path) -> None:
    seen: list[tuple[str, tuple[str, ...]]] = []
    service = start(tmp_path, seen)
    try:
        refused = submit(service, tmp_path, raise_error="OutOfDistribution")
        problem_of(service, refused)
        assert seen == []
        assert service.queue.deliveries.of_job(refused) == []
        job = submit(service, tmp_path)
        wait_for_state(service, job, "succeeded")
        assert seen == [("tiny-0.0.1", service.queue.get(job).results)]
        assert [d.target for d in service.queue.deliveries.of_job(job)] == ["archive"]
        metrics = service.queue.metrics()
        assert b'counterpart_deliveries{state="pending",target="archive"} 1.0' in metrics
        assert b'counterpart_delivery_age_seconds{target="archive"} ' in metrics
        service.queue.erase(job)
        assert service.queue.deliveries.of_job(job) == []
    finally:
        service.stop(0)


def test_a_database_of_an_older_version_gets_the_table(tmp_path: Path) -> None:
    start(tmp_path, []).stop(0)
    database = connect(f"sqlite:///{tmp_path}/jobs.sqlite")
    with database.begin() as connection:
        connection.execute(sa.text("DROP TABLE counterpart_deliveries"))
    service = start(tmp_path, [])
    job = submit(service, tmp_path)
    wait_for_state(service, job, "succeeded")
    service.stop(0)
    assert sa.inspect(database).has_table("counterpart_deliveries")
    database.dispose()


def test_delivery_that_fails_for_weeks_is_tried_again(deliveries: Deliveries) -> None:
    deliveries.plan("job", ROUTES[:1])
    with deliveries._database.begin() as connection:
        connection.execute(module.deliveries_table.update().values(attempts=2000))
    assert deliveries.record_failure(claim(deliveries), "unreachable", 1000 * HOUR)
    (found,) = deliveries.of_job("job")
    assert found.next_try is not None
    assert found.next_try.timestamp() - time.time() == pytest.approx(module.MAX_RETRY_SECONDS, abs=60)
