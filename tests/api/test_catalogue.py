"""Catalogue of DICOM instances with many jobs: pages from the database, few files read, little in memory."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest
import sqlalchemy as sa
from pydicom.dataset import Dataset

from app.api.catalogue import Catalogue, Entry
from app.errors import SearchTooBroad
from app.export.outputs import SEGMENTATION_NAME, STRUCTURED_REPORT_NAME
from app.ingest.dicom import instances
from app.jobs.database import connect, workflow_table
from app.jobs.instances import InstanceFilter, InstanceIndex
from app.jobs.job import Job
from app.jobs.queue import WORKFLOW, JobQueue
from app.jobs.store import Store, StoredFile
from tests.support.dicom import Series, make_datasets
from tests.support.phantom import brain
from tests.support.workflow_table import create_workflow_table

RESULTS = (SEGMENTATION_NAME, STRUCTURED_REPORT_NAME)
EVERYTHING = InstanceFilter()


class FakeJobs:
    """Queue and store of jobs. Each has a scan of two images and two results, which are the images with other UIDs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database = connect(f"sqlite:///{folder}/jobs.sqlite")
        self._table = workflow_table(self._database)
        create_workflow_table(self._database)
        self.instances = InstanceIndex(self._database, WORKFLOW)
        self.instances.create_tables()
        self._slices = make_datasets(brain(), Series())[:2]

    def add(self, job: str, study: str, accession: str = "A1") -> None:
        for folder, series, suffix in (("scan", 0, ""), ("results", 1, ".9")):
            (self._folder / job / folder).mkdir(parents=True)
            for number, dataset in enumerate(self._slices):
                dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, f"{study}.{series + number * series}"
                dataset.SOPInstanceUID, dataset.AccessionNumber = f"{study}.{number}{suffix}", accession
                name = RESULTS[number] if series else f"{number:06d}"
                self._save(dataset, self._folder / job / folder / name)
        row = {"workflow_uuid": job, "name": WORKFLOW, "status": "SUCCESS", "created_at": self.count() + 1}
        with self._database.begin() as connection:
            connection.execute(self._table.insert().values(**row))

    def _save(self, dataset: Dataset, path: Path) -> None:
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(path, enforce_file_format=True)

    def count(self) -> int:
        with self._database.connect() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(self._table)).scalar_one()

    def erase(self, job: str) -> None:
        with self._database.begin() as connection:
            connection.execute(self._table.delete().where(self._table.c.workflow_uuid == job))

    def find(self, jobs: Sequence[str]) -> dict[str, Job]:
        now = datetime.now(UTC)
        return {job: Job(job, "succeeded", None, 1, None, now, now, now, None, "", results=RESULTS) for job in jobs}

    def read_states(self, jobs: Sequence[str]) -> dict[str, None]:
        with self._database.connect() as connection:
            query = sa.select(self._table.c.workflow_uuid).where(self._table.c.workflow_uuid.in_(jobs))
            return dict.fromkeys(connection.execute(query).scalars())

    def fetch(self, job: str, name: str) -> StoredFile:
        return StoredFile(self._folder / job / "results" / name)

    def scan_files(self, job: str) -> list[Path]:
        return sorted((self._folder / job / "scan").iterdir())


def open_catalogue(jobs: FakeJobs) -> Catalogue:
    return Catalogue(cast("JobQueue", jobs), cast("Store", jobs))


@pytest.fixture
def jobs(tmp_path: Path) -> FakeJobs:
    return FakeJobs(tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files whose attributes were read."""
    seen: list[Path] = []

    def read(path: Path, keywords: Sequence[str]) -> instances.DicomJson:
        seen.append(path)
        return instances.read_attributes(path, keywords)

    monkeypatch.setattr("app.api.catalogue.read_attributes", read)
    return seen


def has_accession(number: str, group: Sequence[Entry]) -> bool:
    return any(entry.text("00080050") == number for entry in group)


def test_a_search_reads_the_files_of_its_page_only(jobs: FakeJobs, reads: list[Path]) -> None:
    for number in range(300):
        jobs.add(f"job-{number}", f"1.2.{number}")
    first = open_catalogue(jobs)
    groups, total = first.search("study", EVERYTHING, 10, 20)
    assert [group[0].job for group in groups] == [f"job-{number}" for number in range(279, 269, -1)]
    assert ([len(group) for group in groups], total) == ([2] * 10, 300)
    assert len(reads) == 600  # each result once, for the index
    reads.clear()
    restarted = open_catalogue(jobs)
    assert restarted.search("series", EVERYTHING, 4, 0)[1] == 600
    assert len(reads) == 4
    jobs.add("later", "1.2.999")
    reads.clear()
    groups, total = restarted.search("study", EVERYTHING, 1, 0)
    assert ([entry.job for entry in groups[0]], total) == (["later", "later"], 301)
    assert len(reads) == 2


def test_a_filter_that_needs_the_files_is_paged_in_memory_and_limited(
    jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.catalogue.PAGE", 8)
    monkeypatch.setattr("app.api.catalogue.CACHED_INSTANCES", 10)
    for number in range(50):
        jobs.add(f"job-{number}", f"1.2.{number}", accession="even" if number % 2 == 0 else "odd")
    catalogue = open_catalogue(jobs)
    groups, total = catalogue.search("study", EVERYTHING, 3, 20, lambda group: has_accession("even", group))
    assert ([group[0].job for group in groups], total) == (["job-8", "job-6", "job-4"], 25)
    assert sum(map(len, catalogue._entries.values())) <= 10
    monkeypatch.setattr("app.api.catalogue.MAX_CANDIDATES", 49)
    with pytest.raises(SearchTooBroad):
        catalogue.search("study", EVERYTHING, 3, 0, lambda group: has_accession("even", group))
    two = InstanceFilter({"study": ["1.2.3", "1.2.4"]})
    groups, _ = catalogue.search("study", two, 3, 0, lambda group: has_accession("even", group))
    assert [group[0].job for group in groups] == ["job-4"]


def test_a_result_of_two_jobs_is_found_once(jobs: FakeJobs) -> None:
    jobs.add("first", "1.2.3")
    jobs.add("second", "1.2.3")
    catalogue = open_catalogue(jobs)
    for groups, total in (catalogue.search(level, EVERYTHING, 10, 0) for level in ("study", "series", "instance")):
        assert sum(map(len, groups)) == 2
        assert {entry.job for group in groups for entry in group} == {"second"}
        assert total == len(groups)
    assert len(catalogue.find("1.2.3")) == 4  # with the images of the scan


def test_attributes_of_erased_jobs_are_forgotten_and_have_a_limit(
    jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, job in enumerate(("one", "two", "three")):
        jobs.add(job, f"1.2.{number}")
    catalogue = open_catalogue(jobs)
    for number in range(3):
        assert len(catalogue.find(f"1.2.{number}")) == 4
    jobs.erase("two")  # another process has erased it
    assert catalogue.find("1.2.1") == []
    assert {entry.job for entries in catalogue._entries.values() for entry in entries} == {"one", "three"}
    monkeypatch.setattr("app.api.catalogue.CACHED_INSTANCES", 6)
    jobs.add("four", "1.2.4")
    assert len(catalogue.find("1.2.4")) == 4
    assert sum(map(len, catalogue._entries.values())) <= 6
