"""Catalogue of the DICOM instances that the service can return: results of its jobs, and the scans that led to them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.export.outputs import DICOM_NAMES, STRUCTURED_REPORT_NAME
from app.ingest.dicom.instances import DicomJson, identify, read_attributes
from app.jobs.job import Cursor, Job, JobFilter
from app.jobs.queue import JobQueue
from app.jobs.store import Store

# Attributes of the answers of a search (PS3.18 tables 10.6.3-3 to 10.6.3-5), as far as an instance has them.
STUDY_KEYWORDS = (
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyID",
)
SERIES_KEYWORDS = ("Modality", "SeriesDescription", "SeriesInstanceUID", "SeriesNumber", "SeriesDate", "SeriesTime")
INSTANCE_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "InstanceNumber",
    "Rows",
    "Columns",
    "BitsAllocated",
    "NumberOfFrames",
)
KEYWORDS = (*STUDY_KEYWORDS, *SERIES_KEYWORDS, *INSTANCE_KEYWORDS)
PAGE = 200
# Results never change, so the attributes of the last jobs stay in memory.
CACHED_JOBS = 1000


@dataclass(frozen=True)
class Entry:
    """One instance.

    Attributes
    ----------
    job : str
    name : str
        Name of a result, or of a file of the scan.
    is_result : bool
    attributes : dict
        Those of `KEYWORDS`, in DICOM JSON.
    """

    job: str
    name: str
    is_result: bool
    attributes: DicomJson

    def uid(self, tag: str) -> str:
        """Return the UID at a tag."""
        return str(self.attributes[tag]["Value"][0])


STUDY, SERIES, INSTANCE = "0020000D", "0020000E", "00080018"


class Catalogue:
    """Instances of all succeeded jobs whose scan was DICOM.

    Parameters
    ----------
    queue : JobQueue
    store : Store
    """

    def __init__(self, queue: JobQueue, store: Store) -> None:
        self._queue = queue
        self._store = store
        self._entries: OrderedDict[tuple[str, bool], tuple[Entry, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, study: str | None = None, series: str | None = None, instance: str | None = None) -> list[Entry]:
        """Return the instances of a study, series or UID, each once, newest job first.

        Without a study, only results are returned: the headers of all scans would have to be read.
        """
        wanted = {STUDY: study, SERIES: series, INSTANCE: instance}
        found: dict[str, Entry] = {}
        for job in self._succeeded():
            entries = self._results(job)
            if study is not None and any(entry.uid(STUDY) == study for entry in entries):
                entries = (*entries, *self._scan(job))
            for entry in entries:
                if all(uid is None or entry.uid(tag) == uid for tag, uid in wanted.items()):
                    found.setdefault(entry.uid(INSTANCE), entry)
        return list(found.values())

    def _results(self, job: Job) -> tuple[Entry, ...]:
        def read() -> Iterator[Entry]:
            for name in (name for name in DICOM_NAMES if name in job.results):
                with self._open_result(job.id, name) as path:
                    if path is not None:
                        yield Entry(job.id, name, is_result=True, attributes=read_attributes(path, KEYWORDS))

        return self._cached((job.id, True), read)

    def _scan(self, job: Job) -> tuple[Entry, ...]:
        def read() -> Iterator[Entry]:
            for path in self._store.scan_files(job.id):
                instance = identify(path)
                if instance is not None and instance.is_image:
                    yield Entry(job.id, path.name, is_result=False, attributes=read_attributes(path, KEYWORDS))

        return self._cached((job.id, False), read)

    def _cached(self, key: tuple[str, bool], read: Callable[[], Iterator[Entry]]) -> tuple[Entry, ...]:
        with self._lock:
            known = self._entries.get(key)
            if known is not None:
                self._entries.move_to_end(key)
                return known
        entries = tuple(read())
        with self._lock:
            self._entries[key] = entries
            while len(self._entries) > CACHED_JOBS:
                self._entries.popitem(last=False)
        return entries

    def _succeeded(self) -> Iterator[Job]:
        """Yield the succeeded jobs with DICOM results, newest first."""
        after: Cursor | None = None
        while page := self._queue.list_jobs(JobFilter(states=("succeeded",)), PAGE, after):
            yield from (job for job in page if STRUCTURED_REPORT_NAME in job.results)
            after = Cursor(page[-1].created, page[-1].id)

    @contextmanager
    def open(self, entry: Entry) -> Iterator[Path | None]:
        """Yield the path of an instance, or None if its job was erased in the meantime."""
        if entry.is_result:
            with self._open_result(entry.job, entry.name) as path:
                yield path
        else:
            yield next((path for path in self._store.scan_files(entry.job) if path.name == entry.name), None)

    @contextmanager
    def _open_result(self, job: str, name: str) -> Iterator[Path | None]:
        stored = self._store.fetch(job, name)
        try:
            yield stored.path if stored is not None else None
        finally:
            if stored is not None:
                stored.close()
