"""The deliverer sends each result until its success is recorded, and nothing of other jobs."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from app.jobs import deliveries as deliveries_module
from app.jobs.deliveries import Deliveries
from app.jobs.store import Store
from app.jobs.workflow import JobService
from app.pacs import deliverer as module
from app.pacs.deliverer import Deliverer
from app.pacs.metrics import DeliveryMetrics
from app.pacs.routes import DimseTarget, Routes, StowTarget, Target
from app.pacs.senders import NotSent
from tests.api.support import FakeEngine
from tests.jobs.support import running_service, submit, wait_for_state

TARGET = DimseTarget(kind="dimse", host="127.0.0.1", port=1, ae_title="ARCHIVE")
RESULT = "report.json"  # the fake engine writes no DICOM results


class Case:
    """A deliverer without threads, a job, and the files that were sent."""

    def __init__(self, service: JobService, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.service = service
        self.sent: list[bytes] = []
        self.failures: list[str] = []
        store = Store(folder)
        self.metrics = DeliveryMetrics(CollectorRegistry())
        self.deliverer = Deliverer(Routes(targets={"archive": TARGET}), service, store, self.metrics)
        monkeypatch.setattr("app.pacs.senders.send", self.send)
        self.job = submit(service, folder)
        wait_for_state(service, self.job, "succeeded")
        self.deliveries: Deliveries = service.queue.deliveries

    def send(self, path: Path, _target: Target) -> None:
        self.sent.append(path.read_bytes())
        if self.failures:
            raise NotSent(self.failures.pop(0))

    def audit_rows(self) -> list[tuple[str, str, str, str | None, str | None]]:
        rows = self.service.queue.trail.read_all()
        return [(row.actor, row.action, row.outcome, row.job, row.address) for row in rows]

    def state(self) -> tuple[str, int, str | None]:
        (delivery,) = self.deliveries.of_job(self.job)
        return delivery.state, delivery.attempts, delivery.code


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    with running_service(tmp_path, FakeEngine()) as service:
        yield Case(service, tmp_path, monkeypatch)


def test_a_result_is_sent_once(case: Case) -> None:
    case.deliveries.plan(case.job, [("archive", RESULT)])
    assert case.deliverer.run_once("archive")
    assert not case.deliverer.run_once("archive")
    assert case.state() == ("sent", 1, None)
    assert len(case.sent) == 1
    assert case.metrics.attempts.labels("archive", "sent")._value.get() == 1


def test_a_failure_is_tried_again_with_the_same_object(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries_module, "RETRY_SECONDS", 0.0)
    case.failures = ["unreachable", "aborted"]
    case.deliveries.plan(case.job, [("archive", RESULT)])
    while case.deliverer.run_once("archive"):
        pass
    assert case.state() == ("sent", 3, None)
    assert len(case.sent) == 3
    assert len(set(case.sent)) == 1


def test_a_process_that_dies_before_the_record_sends_the_same_object_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.deliveries.plan(case.job, [("archive", RESULT)])
    with monkeypatch.context() as patch:
        patch.setattr(Deliveries, "record_sent", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            case.deliverer.run_once("archive")
    assert case.state() == ("pending", 0, None)
    assert not case.deliverer.run_once("archive")  # the claim has not ended
    case.deliveries.release_claims(case.service.process_name)  # the next process of this slot does so
    assert case.deliverer.run_once("archive")
    assert case.state() == ("sent", 1, None)
    assert len(set(case.sent)) == 1


def test_the_claim_of_a_long_send_is_renewed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.01)
    case.deliveries.plan(case.job, [("archive", RESULT)])
    ends: list[datetime | None] = []

    def send(*_: object) -> None:
        deadline = time.monotonic() + 30
        while len(set(ends)) < 3 and time.monotonic() < deadline:
            ends.append(case.deliveries.of_job(case.job)[0].next_try)

    monkeypatch.setattr("app.pacs.senders.send", send)
    assert case.deliverer.run_once("archive")
    assert len(set(ends)) == 3
    assert case.state() == ("sent", 1, None)
    assert "delivery-claim" not in {thread.name for thread in threading.enumerate()}


def test_the_claim_of_a_send_that_never_ends_is_renewed_a_limited_number_of_times(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.0)
    monkeypatch.setattr(module, "MAX_RENEWALS", 3)
    renewals: list[object] = []

    def renew(_: Deliveries, claim: object) -> bool:
        renewals.append(claim)
        return True

    monkeypatch.setattr(Deliveries, "renew", renew)
    monkeypatch.setattr("app.pacs.senders.send", lambda *_: time.sleep(0.5))
    case.deliveries.plan(case.job, [("archive", RESULT)])
    assert case.deliverer.run_once("archive")
    assert len(renewals) == 3


@pytest.mark.parametrize("code", [None, "aborted"])
def test_a_send_that_another_process_overtakes_does_not_change_the_success(
    case: Case, monkeypatch: pytest.MonkeyPatch, code: str | None
) -> None:
    case.deliveries.plan(case.job, [("archive", RESULT)])

    def send(*_: object) -> None:
        case.deliveries.release_claims("")  # as if the claim had ended
        other = case.deliveries.claim("other", "archive")
        assert other is not None
        assert case.deliveries.record_sent(other)
        if code:
            raise NotSent(code)

    monkeypatch.setattr("app.pacs.senders.send", send)
    with capture_logs() as logs:
        assert case.deliverer.run_once("archive")
    assert case.state() == ("sent", 1, None)
    assert not case.deliverer.run_once("archive")
    events = {entry["event"] for entry in logs if "target" in entry}
    assert events == {f"result {'not ' if code else ''}sent; another process has the delivery, or the job was erased"}
    # The other process writes the end of the delivery. What this one has sent is in the trail, too.
    assert [row[2] for row in case.audit_rows()] == (["begun"] if code else ["begun", "sent"])


def test_an_unexpected_error_is_a_failed_attempt(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.pacs.senders.send", lambda *_: 1 / 0)
    case.deliveries.plan(case.job, [("archive", RESULT)])
    assert case.deliverer.run_once("archive")
    assert case.state() == ("pending", 1, "internal_error")


def test_a_target_that_is_no_longer_in_the_routes_is_a_failed_attempt(case: Case) -> None:
    case.deliveries.plan(case.job, [("former", RESULT)])
    assert not case.deliverer.run_once("archive")
    assert case.deliverer.run_once(("archive",))
    assert case.state() == ("pending", 1, "unknown_target")


def test_a_missing_result_is_not_tried_again(case: Case) -> None:
    case.deliveries.plan(case.job, [("archive", "segmentation.dcm")])
    assert case.deliverer.run_once("archive")
    assert case.state() == ("failed", 1, "no_such_result")


def test_nothing_is_sent_before_the_job_has_succeeded_or_after_its_end(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TICK_SECONDS", 0.0)
    get = case.service.queue.get
    for state, left in (("running", 1), ("cancelled", 0)):
        case.deliveries.plan(case.job, [("archive", RESULT)])
        with monkeypatch.context() as patch:
            patch.setattr(case.service.queue, "get", lambda job, state=state: replace(get(job), state=state))
            assert case.deliverer.run_once("archive")
        assert len(case.deliveries.of_job(case.job)) == left
    assert case.sent == []


def test_the_threads_deliver_and_stop(case: Case) -> None:
    case.deliveries.plan(case.job, [("archive", RESULT)])
    case.deliverer.start()
    while case.state()[0] != "sent":
        pass
    case.deliverer.stop()
    assert len(case.sent) == 1


def test_each_delivery_has_its_begin_and_its_end_in_the_audit_trail(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries_module, "RETRY_SECONDS", 0.0)
    case.failures = ["unreachable", "aborted"]
    case.deliveries.plan(case.job, [("archive", RESULT), ("archive", "segmentation.dcm")])
    while case.deliverer.run_once("archive"):
        pass
    row = ("service", "deliver")
    of_archive = (case.job, "127.0.0.1:1")
    assert sorted(case.audit_rows()) == sorted(
        [(*row, outcome, *of_archive) for outcome in ("begun", "sent", "begun", "no_such_result")]
    )


def test_a_delivery_that_is_given_up_ends_in_the_audit_trail(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Routes, "give_up_seconds", 0.0)
    case.failures = ["0xA700"]
    case.deliveries.plan(case.job, [("archive", RESULT)])
    assert case.deliverer.run_once("archive")
    assert case.state() == ("failed", 1, "0xA700")
    assert [row[2] for row in case.audit_rows()] == ["begun", "0xA700"]


def test_nothing_is_sent_without_a_row(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.deliveries.plan(case.job, [("archive", RESULT)])
    with monkeypatch.context() as patch:
        patch.setattr(case.service.queue.trail, "write", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            case.deliverer.run_once("archive")
    assert case.sent == []
    case.deliveries.release_claims(case.service.process_name)
    assert case.deliverer.run_once("archive")
    assert [row[2] for row in case.audit_rows()] == ["begun", "sent"]


def test_the_target_of_a_row_has_a_host_and_a_port() -> None:
    assert TARGET.address == "127.0.0.1:1"
    web = StowTarget.model_validate({"kind": "stow", "url": "https://pacs.example/web"})
    assert web.address == "pacs.example:443"
