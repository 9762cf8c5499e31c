"""Each received series becomes a job exactly once, wherever the process died."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from app.errors import QueueFull
from app.ingest.dicom.storage import read_identifiers
from app.jobs.store import sync_to_disk
from app.pacs import spool
from app.pacs.handover import ERASED_NOTE
from app.pacs.spool import Sender, Spool
from tests.pacs.support import HandOverCase, hand_over_case, make_slices, read_note

SCANNER = Sender("SCANNER", "10.0.0.5")


class Died(Exception):
    """Death of the process, as far as the spool and the database can see."""


@pytest.fixture
def case(tmp_path: Path) -> Iterator[HandOverCase]:
    with hand_over_case(tmp_path) as running:
        yield running


def receive(spool: Spool, name: str = "one", numbers: slice = slice(None), sender: Sender = SCANNER) -> None:
    for number, dataset in enumerate(make_slices(name)[numbers]):
        path = spool.receiving / f"{number}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        spool.add(path, read_identifiers(path), sender)


def contents(tmp_path: Path, numbers: slice = slice(None)) -> list[bytes]:
    result = []
    for dataset in make_slices()[numbers]:
        dataset.save_as(tmp_path / "expected", enforce_file_format=True)
        result.append((tmp_path / "expected").read_bytes())
    return sorted(result)


def test_each_series_of_a_study_becomes_a_job_of_its_own(case: HandOverCase, tmp_path: Path) -> None:
    receive(case.spool, "one")
    receive(case.spool, "two")
    case.hand_over.run_once()
    jobs = case.jobs()
    assert len(jobs) == 2
    assert contents(tmp_path) in [case.scan(job) for job in jobs]
    assert case.spool.count_waiting() == (0, 0)
    case.hand_over.run_once()
    assert case.jobs() == jobs


def test_a_process_that_dies_after_the_take_submits_at_the_next_start(
    case: HandOverCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive(case.spool)
    with monkeypatch.context() as patch:
        patch.setattr(case.service.queue, "submit", raise_died)
        with pytest.raises(Died):
            case.hand_over.run_once()
    assert case.jobs() == []
    case.restart()
    case.hand_over.run_once()
    assert len(case.jobs()) == 1


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_process_that_dies_after_the_submission_makes_no_second_job(
    case: HandOverCase, monkeypatch: pytest.MonkeyPatch, *, cancelled: bool
) -> None:
    receive(case.spool)
    with monkeypatch.context() as patch:
        patch.setattr(case.spool, "finish", raise_died)
        with pytest.raises(Died):
            case.hand_over.run_once()
    (job,) = case.jobs()
    if cancelled:  # the same content would become a new job
        case.service.queue.cancel(job)
    case.restart()
    case.hand_over.run_once()
    assert case.jobs() == [job]
    assert case.spool.count_waiting() == (0, 0)


def test_a_process_that_dies_after_the_record_makes_no_second_job(
    case: HandOverCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive(case.spool)
    with monkeypatch.context() as patch:
        patch.setattr(case.spool, "discard", raise_died)
        with pytest.raises(Died):
            case.hand_over.run_once()
    (job,) = case.jobs()
    case.service.queue.cancel(job)
    case.restart()
    case.hand_over.run_once()
    assert case.jobs() == [job]
    assert case.spool.batches() == []


def raise_died(*_: object, **__: object) -> None:
    raise Died


def test_the_same_series_again_gives_the_same_job(case: HandOverCase) -> None:
    for numbers in (slice(None), slice(None), slice(1, 3)):
        receive(case.spool, numbers=numbers)
        case.hand_over.run_once()
        assert len(case.jobs()) == 1
    assert case.metrics.series.labels("repeated")._value.get() == 2


def test_a_series_whose_job_was_cancelled_becomes_a_new_job(case: HandOverCase) -> None:
    receive(case.spool)
    case.hand_over.run_once()
    case.service.queue.cancel(case.jobs()[0])
    receive(case.spool)
    case.hand_over.run_once()
    assert len(case.jobs()) == 2


def test_late_instances_become_a_new_job_of_the_whole_series(case: HandOverCase, tmp_path: Path) -> None:
    receive(case.spool, numbers=slice(0, 3))
    case.hand_over.run_once()
    (first,) = case.jobs()
    receive(case.spool, numbers=slice(3, 4))
    case.hand_over.run_once()
    (second,) = set(case.jobs()) - {first}
    assert case.scan(first) == contents(tmp_path, slice(0, 3))
    assert case.scan(second) == contents(tmp_path)
    assert read_note(first) == ""
    note = f"The series arrived in parts. Job {first} analysed it without 1 of these images."
    assert read_note(second) == note
    receive(case.spool)  # now all of them again
    case.hand_over.run_once()
    assert len(case.jobs()) == 2


def test_a_whole_series_after_a_part_of_it_is_a_new_job_with_a_note(case: HandOverCase, tmp_path: Path) -> None:
    receive(case.spool, numbers=slice(0, 3))
    case.hand_over.run_once()
    (first,) = case.jobs()
    receive(case.spool)
    case.hand_over.run_once()
    (second,) = set(case.jobs()) - {first}
    assert case.scan(second) == contents(tmp_path)
    assert "without 1 of these images" in read_note(second)


def test_a_batch_that_fails_delays_no_other(case: HandOverCase) -> None:
    receive(case.spool, "one")
    receive(case.spool, "two")
    batches = [case.spool.take(key) for key in case.spool.quiet_series(0)]
    damaged = batches[0].files[0]
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.mkdir()
    with pytest.raises(IsADirectoryError):
        case.hand_over.run_once()
    assert len(case.jobs()) == 1
    damaged.rmdir()
    damaged.write_bytes(content)
    case.hand_over.run_once()
    assert len(case.jobs()) == 2


def test_a_sync_that_fails_after_the_take_stops_no_series(case: HandOverCase, monkeypatch: pytest.MonkeyPatch) -> None:
    receive(case.spool, "one")
    receive(case.spool, "two")
    failures = [OSError(5, "Input/output error")]
    sync = sync_to_disk

    def fail_once(*paths: Path) -> None:
        if paths[-1].name == "batches" and failures:
            raise failures.pop()
        sync(*paths)

    monkeypatch.setattr(spool, "sync_to_disk", fail_once)
    with pytest.raises(OSError, match="Input/output error"):
        case.hand_over.run_once()
    assert len(case.jobs()) == 1
    case.hand_over.run_once()
    assert [len(case.scan(job)) for job in case.jobs()] == [4, 4]
    assert case.spool.count_waiting() == (0, 0)


def test_a_removed_folder_stops_no_other_series(case: HandOverCase) -> None:
    receive(case.spool, "one")
    shutil.rmtree(next((case.spool.root / "series").iterdir()))
    receive(case.spool, "two")
    with pytest.raises(FileNotFoundError):
        case.hand_over.run_once()
    assert len(case.jobs()) == 1
    case.hand_over.run_once()  # the removed series no longer waits
    receive(case.spool, "one")
    case.hand_over.run_once()
    assert len(case.jobs()) == 2


def test_late_instances_of_an_erased_job_say_what_is_missing(case: HandOverCase, tmp_path: Path) -> None:
    receive(case.spool, numbers=slice(0, 3))
    case.hand_over.run_once()
    case.service.queue.erase(case.jobs()[0])
    receive(case.spool, numbers=slice(3, 4))
    case.hand_over.run_once()
    (job,) = case.jobs()
    assert case.scan(job) == contents(tmp_path, slice(3, 4))
    assert read_note(job) == ERASED_NOTE
    receive(case.spool, numbers=slice(0, 3))  # the erased images again
    case.hand_over.run_once()
    (again,) = set(case.jobs()) - {job}
    assert case.scan(again) == contents(tmp_path)


def test_the_spool_keeps_nothing_of_an_erased_job(case: HandOverCase) -> None:
    receive(case.spool)
    case.hand_over.run_once()
    case.service.queue.erase(case.jobs()[0])
    case.restart()  # the search for erased jobs is due at the start
    case.hand_over.run_once()
    assert [path.name for path in case.spool.root.rglob("*") if path.is_file()] == ["lock"]


def test_a_full_queue_loses_nothing(tmp_path: Path) -> None:
    with hand_over_case(tmp_path, queue_limit=1) as case:
        receive(case.spool, "one")
        receive(case.spool, "two", slice(0, 2))
        with pytest.raises(QueueFull):
            case.hand_over.run_once()
        assert len(case.jobs()) == 1
        assert case.spool.count_waiting() == (1, 0)
        assert case.spool.oldest_seconds() > 0  # for the alert
        receive(case.spool, "two", slice(2, 4))  # the series still grows
        case.service.queue.cancel(case.jobs()[0])
        case.hand_over.run_once()
        assert sorted(len(case.scan(job)) for job in case.jobs()) == [4, 4]


def test_batch_that_fails_each_time_does_not_stop_the_sweep(
    case: HandOverCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive(case.spool, "one")
    case.hand_over.run_once()
    (job,) = case.jobs()
    case.service.queue.erase(job)
    case.hand_over._last_sweep = float("-inf")
    receive(case.spool, "two")
    monkeypatch.setattr(case.service.queue, "submit", raise_died)
    with pytest.raises(Died):
        case.hand_over.run_once()
    assert list(case.spool.handed_jobs()) == []


def test_sweep_asks_for_many_jobs_in_parts(case: HandOverCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL accepts 65,535 parameters in one statement."""
    receive(case.spool, "one")
    case.hand_over.run_once()
    (job,) = case.jobs()
    handed = {f"{number:032x}": f"{number:016x}-{number:016x}" for number in range(3000)}
    execute, numbers = sa.engine.Connection.execute, []

    def count(connection: sa.Connection, statement: sa.Select[Any], *args: Any) -> Any:
        numbers.append(len(str(statement.compile(compile_kwargs={"literal_binds": True})).split(",")))
        return execute(connection, statement, *args)

    monkeypatch.setattr(sa.engine.Connection, "execute", count)
    monkeypatch.setattr(case.spool, "handed_jobs", lambda: iter({**handed, "kept": job}.items()))
    forgotten: list[str] = []
    monkeypatch.setattr(case.spool, "forget", forgotten.append)
    case.hand_over._forget_erased_jobs()
    assert sorted(forgotten) == sorted(handed)
    assert 1 < max(numbers) < 2000


def audit_rows(case: HandOverCase) -> list[tuple[str, str, str, str | None, str | None]]:
    rows = case.service.queue.trail.read_all()
    return [(row.actor, row.action, row.outcome, row.job, row.address) for row in rows]


def test_a_series_that_becomes_a_job_is_in_the_audit_trail(case: HandOverCase) -> None:
    receive(case.spool, numbers=slice(0, 2))
    receive(case.spool, numbers=slice(2, 4), sender=Sender("PACS", "10.0.0.6"))
    case.restart()  # the senders survive the process
    case.hand_over.run_once()
    (job,) = case.jobs()
    scanner, pacs = ("dicom:SCANNER", "send"), ("dicom:PACS", "send")
    expected = [
        (*scanner, "begun", None, "10.0.0.5"),
        (*pacs, "begun", None, "10.0.0.6"),
        (*scanner, "accepted", job, "10.0.0.5"),
        (*pacs, "accepted", job, "10.0.0.6"),
    ]
    assert audit_rows(case) == expected
    receive(case.spool)  # the same series again, from the scanner alone
    case.hand_over.run_once()
    assert audit_rows(case)[4:] == [expected[0], expected[2]]


def test_a_series_without_a_row_is_no_job_yet(case: HandOverCase, monkeypatch: pytest.MonkeyPatch) -> None:
    receive(case.spool)
    with monkeypatch.context() as patch:
        patch.setattr(case.service.queue.trail, "write", raise_died)
        with pytest.raises(Died):
            case.hand_over.run_once()
    assert case.jobs() == []
    assert audit_rows(case) == []
    assert case.service.queue._metrics.audit_failures._value.get() == 1
    case.hand_over.run_once()
    assert [row[2] for row in audit_rows(case)] == ["begun", "accepted"]


def test_a_process_that_dies_after_the_submission_still_writes_its_row(
    case: HandOverCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive(case.spool)
    queue = case.service.queue
    write = queue.trail.write
    with monkeypatch.context() as patch:
        patch.setattr(queue.trail, "write", lambda entry: write(entry) if entry.job is None else raise_died())
        with pytest.raises(Died):
            case.hand_over.run_once()
    case.restart()
    case.hand_over.run_once()
    (job,) = case.jobs()
    assert [row[2:4] for row in audit_rows(case)] == [("begun", None), ("begun", None), ("accepted", job)]


def test_a_series_that_is_tried_again_begins_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hand_over_case(tmp_path) as case:
        receive(case.spool)
        with monkeypatch.context() as patch:
            patch.setattr(case.service.queue, "submit", raise_died)
            for _ in range(3):
                with pytest.raises(Died):
                    case.hand_over.run_once()
        case.hand_over.run_once()
        assert [row[2] for row in audit_rows(case)] == ["begun", "accepted"]
