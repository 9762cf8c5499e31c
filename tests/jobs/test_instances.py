"""Index of DICOM results: pages of studies, series and instances of many jobs, on SQLite and PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.jobs.database import connect, workflow_table
from app.jobs.instances import IndexedInstance, InstanceFilter, InstanceIndex, Level, metadata
from tests.support.workflow_table import create_workflow_table

WORKFLOW = "analyse_scan"
JOBS = 1000
NO_CONDITION = InstanceFilter()


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    sqlite = f"sqlite:///{tmp_path}/jobs.sqlite"
    opened = connect(sqlite if request.param == "sqlite" else request.getfixturevalue("database"))
    create_workflow_table(opened)
    yield opened
    with opened.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE {workflow_table(opened).fullname}"))
        metadata.drop_all(connection)
    opened.dispose()


@pytest.fixture
def index(engine: sa.Engine) -> InstanceIndex:
    created = InstanceIndex(engine, WORKFLOW)
    created.create_tables()
    created.create_tables()
    return created


def add_jobs(engine: sa.Engine, *jobs: str, status: str = "SUCCESS", name: str = WORKFLOW) -> None:
    """Add rows of jobs, each a second newer than the one before."""
    with engine.begin() as connection:
        rows = [
            {"workflow_uuid": job, "name": name, "status": status, "created_at": 1000 * number}
            for number, job in enumerate(jobs)
        ]
        connection.execute(workflow_table(engine).insert(), rows)


def remove_job(engine: sa.Engine, job: str) -> None:
    """Remove the row of a job, and leave those of the index."""
    jobs = workflow_table(engine)
    with engine.begin() as connection:
        connection.execute(jobs.delete().where(jobs.c.workflow_uuid == job))


def stored_jobs(engine: sa.Engine) -> list[set[str]]:
    """Return the jobs in each table of the index."""
    with engine.connect() as connection:
        return [set(connection.execute(sa.select(table.c.job)).scalars()) for table in metadata.sorted_tables]


def results(job: str, study: str, date: str | None = "20260101") -> list[IndexedInstance]:
    """Return a segmentation and a report."""
    return [
        IndexedInstance(job, "segmentation.dcm", study, f"{study}.1", f"{study}.1.1", "1.66.4", "SEG", date),
        IndexedInstance(job, "report.dcm", study, f"{study}.2", f"{study}.2.1", "1.88.33", "SR", date),
    ]


@pytest.mark.parametrize("level", ["study", "series", "instance"])
def test_pages_have_each_uid_once_newest_job_first(engine: sa.Engine, index: InstanceIndex, level: Level) -> None:
    jobs = [f"job-{number:04d}" for number in range(JOBS)]
    add_jobs(engine, *jobs)
    # Each scan was analysed twice.
    index.add({job: results(job, f"1.2.{number // 2}") for number, job in enumerate(jobs)})
    uids = [row for number in reversed(range(JOBS // 2)) for row in results("", f"1.2.{number}")]
    expected = list(dict.fromkeys(getattr(row, level) for row in uids))
    assert index.count(level, NO_CONDITION) == len(expected)
    assert index.page(level, NO_CONDITION, 10, 0) == expected[:10]
    pages = [index.page(level, NO_CONDITION, 300, offset) for offset in range(0, len(expected) + 300, 300)]
    assert [uid for page in pages for uid in page] == expected
    assert pages[-1] == []


def test_conditions(engine: sa.Engine, index: InstanceIndex) -> None:
    add_jobs(engine, "old", "none", "new")
    index.add({"old": results("old", "1.1", "20251231")})
    index.add({"none": results("none", "1.2", None)[:1]})
    index.add({"new": results("new", "1.3")})

    def found(level: Level = "study", **conditions: object) -> list[str]:
        wanted = InstanceFilter(**conditions)  # type: ignore[arg-type]
        page = index.page(level, wanted, 10, 0)
        assert index.count(level, wanted) == len(page)
        return page

    assert found() == ["1.3", "1.2", "1.1"]
    assert found(accepted={"study": ["1.1", "1.2", "9"]}) == ["1.2", "1.1"]
    assert found("series", accepted={"modality": ["SR"]}) == ["1.3.2", "1.1.2"]
    assert found("instance", accepted={"sop_class": ["1.66.4"], "study": ["1.3"]}) == ["1.3.1.1"]
    assert found(modalities=["SR"], accepted={"modality": ["SEG"]}) == ["1.3", "1.1"]
    assert found("series", modalities=["SR"], accepted={"modality": ["SEG"]}) == []
    assert found(first_date="20260101") == ["1.3"]
    assert found(last_date="20251231") == ["1.1"]
    assert found(first_date="20251231", last_date="202601") == ["1.3", "1.1"]
    assert found(accepted={"study_date": ["20260101"]}) == ["1.3"]


def test_only_jobs_that_succeeded_are_missing(engine: sa.Engine, index: InstanceIndex) -> None:
    add_jobs(engine, "old", "new")
    add_jobs(engine, "failed", status="ERROR")
    add_jobs(engine, "other", name="another_workflow")
    assert index.missing(10) == ["new", "old"]
    assert index.missing(1) == ["new"]
    index.add({"new": []})  # its scan was not DICOM
    assert index.missing(10) == ["old"]
    index.add({"old": results("old", "1.1")})
    index.add({"old": results("old", "1.1")})  # another process
    assert index.missing(10) == []
    assert [row.name for row in index.find(study="1.1")] == ["segmentation.dcm", "report.dcm"]
    assert index.find(study="1.1", series="1.1.2") == results("old", "1.1")[1:]


def test_an_erased_job_is_found_no_more(engine: sa.Engine, index: InstanceIndex) -> None:
    add_jobs(engine, "one", "two")
    index.add({job: results(job, f"1.{job}") for job in ("one", "two")})
    remove_job(engine, "one")
    assert index.page("study", NO_CONDITION, 10, 0) == ["1.two"]  # before its rows are erased
    assert index.find(study="1.one") == []
    index.add({"one": results("one", "1.one")})  # a search that has read it before
    index.erase("one")
    index.add({"one": results("one", "1.one")})
    assert stored_jobs(engine) == [{"two"}, {"two"}]


def test_orphans_are_removed(engine: sa.Engine, index: InstanceIndex) -> None:
    add_jobs(engine, "one", "two")
    index.add({job: results(job, f"1.{job}") for job in ("one", "two")})
    remove_job(engine, "one")
    index.remove_orphans()
    assert stored_jobs(engine) == [{"two"}, {"two"}]
