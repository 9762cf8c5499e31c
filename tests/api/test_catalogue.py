"""Catalogue of DICOM instances with many jobs: pages from the database, few files read, little in memory.

The last tests search by HTTP: keys with a hyphen, NaN, and damaged results.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from pydicom import dcmread
from pydicom.dataset import Dataset
from structlog.testing import capture_logs

from app.api.catalogue import Catalogue, Entry
from app.errors import SearchTooBroad
from app.export.outputs import SEGMENTATION_NAME, STRUCTURED_REPORT_NAME
from app.ingest.dicom import instances
from app.jobs.database import connect, workflow_table
from app.jobs.instances import InstanceFilter, InstanceIndex
from app.jobs.job import Job
from app.jobs.queue import WORKFLOW, JobQueue
from app.jobs.store import Store, StoredFile
from app.main import create_app
from app.settings import Settings
from tests.api.support import BASE_URL, FakeEngine
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


def test_a_result_that_could_not_be_opened_is_indexed_by_the_next_search(
    jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.add("one", "1.2.1")
    catalogue = open_catalogue(jobs)

    def fail(_path: Path, _keywords: Sequence[str]) -> instances.DicomJson:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr("app.api.catalogue.read_attributes", fail)
        with pytest.raises(OSError):  # noqa: PT011 - an error of the disk has no text of its own
            catalogue.search("study", EVERYTHING, 10, 0)
    assert catalogue.search("instance", EVERYTHING, 10, 0)[1] == 2


# ---- by HTTP -----------------------------------------------------------------------------------


@pytest.fixture
def client(jobs: FakeJobs, tmp_path: Path) -> Iterator[TestClient]:
    app = create_app(Settings(store=str(tmp_path / "service"), drain_seconds=0), FakeEngine(), worker=False)
    with TestClient(app, BASE_URL) as client:
        app.state.services = replace(app.state.services, catalogue=open_catalogue(jobs))
        yield client


def change(jobs: FakeJobs, job: str, **values: object) -> None:
    """Change attributes of the results of a job."""
    for name in RESULTS:
        path = jobs.fetch(job, name).path
        dataset = dcmread(path)
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("AccessionNumber=1234-5678", ["1.2.1"]),
        ("AccessionNumber=2000-1111", ["1.2.2"]),
        ("AccessionNumber=1000-3000", []),
        ("StudyID=1-3", ["1.2.2"]),
        ("StudyDate=20240101-20240630", ["1.2.1"]),
        ("SeriesDate=20240101-20240630", ["1.2.1"]),
        ("StudyTime=1000-", ["1.2.2"]),
        ("StudyInstanceUID=1.2.1&StudyDate=20240101-20240630", ["1.2.1"]),
        ("StudyInstanceUID=1.2.1&StudyDate=20240601-20240630", []),
    ],
)
def test_only_dates_and_times_have_ranges(jobs: FakeJobs, client: TestClient, query: str, found: list[str]) -> None:
    for job, study, accession in (("one", "1.2.1", "1234-5678"), ("two", "1.2.2", "2000-1111")):
        jobs.add(job, study, accession)
    change(jobs, "one", StudyDate="20240515", SeriesDate="20240515", StudyTime="090000", StudyID="2")
    change(jobs, "two", StudyDate="20240715", SeriesDate="20240715", StudyTime="110000", StudyID="1-3")
    answer = client.get(f"/dicomweb/studies?{query}")
    assert answer.status_code == (200 if found else 204)
    assert [item["0020000D"]["Value"][0] for item in (answer.json() if found else [])] == found


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("SeriesDescription=T1,%20axial", ["1.2.1"]),
        ("SeriesDescription=T1", []),
        ("StudyInstanceUID=1.2.1,1.2.2", ["1.2.1", "1.2.2"]),
    ],
)
def test_a_comma_separates_uids_and_belongs_to_a_text(
    jobs: FakeJobs, client: TestClient, query: str, found: list[str]
) -> None:
    jobs.add("one", "1.2.1")
    jobs.add("two", "1.2.2")
    change(jobs, "one", SeriesDescription="T1, axial")
    change(jobs, "two", SeriesDescription="axial")
    answer = client.get(f"/dicomweb/studies?{query}")
    assert answer.status_code == (200 if found else 204)
    assert sorted(item["0020000D"]["Value"][0] for item in (answer.json() if found else [])) == found


def test_metadata_of_a_result_with_nan_is_json(jobs: FakeJobs, client: TestClient) -> None:
    jobs.add("one", "1.2.1")
    change(jobs, "one", DiffusionBValue=float("nan"), DiffusionGradientOrientation=[float("inf"), 0.0, 1.0])
    assert client.get("/dicomweb/studies").status_code == 200
    answer = client.get("/dicomweb/studies/1.2.1/metadata")
    assert answer.status_code == 200
    result = next(item for item in answer.json() if "00189087" in item)
    assert result["00189087"] == {"vr": "FD"}
    assert result["00189089"]["Value"] == [None, 0.0, 1.0]


@pytest.mark.parametrize("kept", [0, 200, 500], ids=["empty", "file meta", "some UIDs"])
def test_a_damaged_result_does_not_hide_the_others(jobs: FakeJobs, client: TestClient, kept: int) -> None:
    jobs.add("damaged", "1.2.1")
    jobs.add("intact", "1.2.2")
    path = jobs.fetch("damaged", SEGMENTATION_NAME).path
    path.write_bytes(path.read_bytes()[:kept])
    with capture_logs() as logs:
        found = client.get("/dicomweb/instances").json()
    assert {item["00080018"]["Value"][0] for item in found} == {"1.2.1.1.9", "1.2.2.0.9", "1.2.2.1.9"}
    (entry,) = [entry for entry in logs if entry["event"] == "instance not readable"]
    assert {"job": "damaged", "result": SEGMENTATION_NAME}.items() <= entry.items()
    assert entry.keys() == {"event", "log_level", "job", "result", "exception", "where"}
    for study, parts in (("1.2.1", 3), ("1.2.2", 4)):
        answer = client.get(f"/dicomweb/studies/{study}")
        assert (answer.status_code, answer.content.count(b"Content-Type: application/dicom")) == (200, parts)
        assert len(client.get(f"/dicomweb/studies/{study}/metadata").json()) == parts
