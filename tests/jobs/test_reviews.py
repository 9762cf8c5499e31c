"""Verdicts on findings: what counts, what is kept, and what is erased, on SQLite and PostgreSQL."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.errors import NotFound
from app.jobs.database import connect, workflow_table
from app.jobs.reviews import Review, ReviewedFinding, Reviews, Verdict, reviews_table, select_latest
from tests.api.support import FakeEngine
from tests.jobs.support import running_service, submit, wait_for_state

JOBS = ("job-1", "job-2")


@pytest.fixture(params=["sqlite", "postgresql"])
def databases(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[sa.Engine, sa.Engine]]:
    """Return the connections of two processes to one database that has the rows of two jobs."""
    sqlite = f"sqlite:///{tmp_path}/jobs.sqlite"
    url = sqlite if request.param == "sqlite" else request.getfixturevalue("database")
    engines = connect(url), connect(url)
    jobs = workflow_table(engines[0])
    with engines[0].begin() as connection:
        if jobs.schema:
            connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {jobs.schema}"))
        connection.execute(sa.text(f"CREATE TABLE {jobs.fullname} (workflow_uuid TEXT PRIMARY KEY)"))
        connection.execute(jobs.insert(), [{"workflow_uuid": job} for job in JOBS])
    yield engines
    with engines[0].begin() as connection:
        connection.execute(sa.text(f"DROP TABLE {jobs.fullname}"))
        reviews_table.drop(connection)
    for engine in engines:
        engine.dispose()


def finding(job: str = "job-1", label: int = 1) -> ReviewedFinding:
    return ReviewedFinding(job, label, "tiny-0.0.1", "test", 2.5, 0.5)


def read_all(reviews: Reviews) -> list[Review]:
    return [review for page in reviews.read_latest() for review in page]


def test_latest_verdict_of_each_reader_counts_and_the_history_is_kept(
    databases: tuple[sa.Engine, sa.Engine],
) -> None:
    first, second = (Reviews(engine) for engine in databases)
    for reviews in (first, second):
        reviews.create_table()
    first.put(finding(), "right", "", "A")
    second.put(finding(), "unsure", "a note", "A")
    again = first.put(finding(), "unsure", "a note", "A")
    second.put(finding(), "wrong", "", "B")
    second.put(finding(label=2), "right", "", "A")
    first.put(finding("job-2"), "wrong", "", "")

    history = second.history("job-1")
    assert [(r.finding.label, r.verdict, r.reader) for r in history] == [
        (1, "right", "A"),
        (1, "unsure", "A"),
        (1, "wrong", "B"),
        (2, "right", "A"),
    ]
    assert again == history[1]
    assert [(r.verdict, r.reader) for r in select_latest(history)] == [("unsure", "A"), ("wrong", "B"), ("right", "A")]
    assert first.count(JOBS) == {"job-1": {"unsure": 1, "wrong": 1, "right": 1}, "job-2": {"wrong": 1}}
    assert [(r.finding.job, r.verdict, r.reader) for r in read_all(first)] == [
        ("job-1", "unsure", "A"),
        ("job-1", "wrong", "B"),
        ("job-1", "right", "A"),
        ("job-2", "wrong", ""),
    ]

    first.remove("job-1", 1, "A")
    first.remove("job-1", 1, "A")
    assert [(r.finding.label, r.reader) for r in second.history("job-1")] == [(1, "B"), (2, "A")]
    first.erase("job-1")
    assert [r.finding.job for r in read_all(second)] == ["job-2"]


def test_the_newest_of_the_verdicts_that_count_is_the_last(
    databases: tuple[sa.Engine, sa.Engine],
) -> None:
    reviews = Reviews(databases[0])
    reviews.create_table()
    reviews.put(finding(), "right", "", "A")
    reviews.put(finding(), "wrong", "", "B")
    reviews.put(finding(), "unsure", "", "A")
    latest = [(review.verdict, review.reader) for review in select_latest(reviews.history("job-1"))]
    assert latest == [("wrong", "B"), ("unsure", "A")] == [(r.verdict, r.reader) for r in read_all(reviews)]


def test_pages_have_each_verdict_once_while_readers_go_on(
    databases: tuple[sa.Engine, sa.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.jobs.reviews.PAGE_ROWS", 10)
    reviews = Reviews(databases[0])
    reviews.create_table()
    verdicts: tuple[Verdict, ...] = ("wrong", "right")
    for verdict in verdicts:  # the second verdict supersedes the first one
        for label in range(1, 26):
            reviews.put(finding(label=label), verdict, "", "A")
    sizes, seen = [], []
    for page in reviews.read_latest():
        sizes.append(len(page))
        seen += [(review.finding.label, review.verdict) for review in page]
        reviews.put(finding(label=1), "unsure", str(len(sizes)), "A")
        reviews.put(finding(label=25), "unsure", str(len(sizes)), "A")
    assert sizes == [10, 10, 5]
    assert seen == [(label, "right") for label in range(1, 26)]


def test_review_of_an_erased_job_is_refused(databases: tuple[sa.Engine, sa.Engine]) -> None:
    reviews = Reviews(databases[0])
    reviews.create_table()
    with pytest.raises(NotFound):
        reviews.put(finding("erased"), "right", "", "")
    assert read_all(reviews) == []


def test_orphans_are_removed(databases: tuple[sa.Engine, sa.Engine]) -> None:
    reviews = Reviews(databases[0])
    reviews.create_table()
    reviews.put(finding("job-1"), "right", "", "")
    reviews.put(finding("job-2"), "right", "", "")
    jobs = workflow_table(databases[0])
    with databases[1].begin() as connection:
        connection.execute(jobs.delete().where(jobs.c.workflow_uuid == "job-1"))
    reviews.remove_orphans()
    assert [r.finding.job for r in read_all(reviews)] == ["job-2"]


def test_erasure_and_review_at_the_same_time_leave_no_review(databases: tuple[sa.Engine, sa.Engine]) -> None:
    """The erasure deletes the row of the job first and the reviews after it, as `JobQueue` does."""
    reviews, other = Reviews(databases[0]), Reviews(databases[1])
    reviews.create_table()
    jobs = workflow_table(databases[0])

    def review() -> None:
        for number in range(60):
            try:
                other.put(finding(), "right", str(number), "A")
            except NotFound:
                return

    thread = threading.Thread(target=review)
    thread.start()
    while not reviews.history("job-1") and thread.is_alive():
        pass
    with databases[0].begin() as connection:
        connection.execute(jobs.delete().where(jobs.c.workflow_uuid == "job-1"))
    reviews.erase("job-1")
    thread.join()
    assert reviews.history("job-1") == []


def test_reviews_survive_a_restart_and_are_erased_with_their_job(tmp_path: Path) -> None:
    note = "a note that names a patient"
    with running_service(tmp_path, FakeEngine()) as service:
        job = submit(service, tmp_path)
        wait_for_state(service, job, "succeeded")
        service.queue.reviews.put(finding(job), "wrong", note, "A")
    with running_service(tmp_path, FakeEngine()) as service:
        assert [r.note for r in service.queue.reviews.history(job)] == [note]
        assert service.queue.get(job).state == "succeeded"
        service.queue.erase(job)
        assert read_all(service.queue.reviews) == []
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as file:
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert note.encode() not in b"".join(path.read_bytes() for path in tmp_path.glob("jobs.sqlite*"))
