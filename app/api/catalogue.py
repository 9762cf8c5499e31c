"""Catalogue of the DICOM instances that the service can return: results of its jobs, and the scans that led to them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from app.errors import SearchTooBroad, error_location
from app.export.outputs import DICOM_NAMES, STRUCTURED_REPORT_NAME
from app.ingest.dicom.instances import DicomJson, identify, read_attributes
from app.jobs.instances import IndexedInstance, InstanceFilter, Level
from app.jobs.job import Job
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
# Studies, series or instances whose files one search may read.
MAX_CANDIDATES = 5000
# Scans and results never change, so the attributes of this many instances stay in memory: about 5 kB each.
CACHED_INSTANCES = 20_000

log = structlog.get_logger("counterpart.catalogue")


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

    def text(self, tag: str) -> str | None:
        """Return the first value at a tag, or None if there is none."""
        values = self.attributes.get(tag, {}).get("Value")
        return str(values[0]) if values else None


STUDY, SERIES, INSTANCE = "0020000D", "0020000E", "00080018"
SOP_CLASS, MODALITY, STUDY_DATE = "00080016", "00080060", "00080020"
UID_TAGS: Mapping[Level, str] = {"study": STUDY, "series": SERIES, "instance": INSTANCE}
# Condition on the instances of a study or series, or on one instance.
Matches = Callable[[Sequence[Entry]], bool]


class Catalogue:
    """Instances of all succeeded jobs whose scan was DICOM.

    The database has an index of the results. Their other attributes are read from the files.

    Parameters
    ----------
    queue : JobQueue
    store : Store
    """

    def __init__(self, queue: JobQueue, store: Store) -> None:
        self._queue = queue
        self._store = store
        self._index = queue.instances
        # By job and name of the result. The images of a job's scan have the name None.
        self._entries: OrderedDict[tuple[str, str | None], tuple[Entry, ...]] = OrderedDict()
        self._count = 0
        self._lock = threading.Lock()
        self._update_lock = threading.Lock()

    # ---- find ----

    def find(self, study: str, series: str | None = None, instance: str | None = None) -> list[Entry]:
        """Return the instances of a study, series or UID with the images of the scans, each once, newest job first."""
        self._update()
        wanted = {SERIES: series, INSTANCE: instance}
        found: dict[str, Entry] = {}
        rows = self._index.find(study=study)
        for job in dict.fromkeys(row.job for row in rows):
            for entry in (*self._read([row for row in rows if row.job == job]), *self._scan(job)):
                if entry.uid(STUDY) == study and all(uid in (None, entry.uid(tag)) for tag, uid in wanted.items()):
                    found.setdefault(entry.uid(INSTANCE), entry)
        return list(found.values())

    def search(
        self, level: Level, wanted: InstanceFilter, limit: int, offset: int, matches: Matches | None = None
    ) -> tuple[list[list[Entry]], int]:
        """Return a page of the results as studies, series or instances, newest job first, and the number of all.

        Images of scans are not found: the headers of all scans would have to be read.

        Parameters
        ----------
        level : {"study", "series", "instance"}
        wanted : InstanceFilter
            Conditions that the database checks.
        limit, offset : int
        matches : callable, optional
            Condition that needs the other attributes. The files of all candidates are read, page by page.

        Raises
        ------
        SearchTooBroad
            `matches` would have to check too many candidates.
        """
        self._update()
        total = self._index.count(level, wanted)
        if matches is None:
            return self._load(level, self._index.page(level, wanted, limit, offset)), total
        if total > MAX_CANDIDATES:
            raise SearchTooBroad(
                f"The search has {total} candidates, whose files would have to be read.",
                expected=f"at most {MAX_CANDIDATES} candidates.",
                advice="Add StudyInstanceUID, or a range of StudyDate.",
            )
        page, count = [], 0
        for start in range(0, total, PAGE):
            for group in filter(matches, self._load(level, self._index.page(level, wanted, PAGE, start))):
                if offset <= count < offset + limit:
                    page.append(group)
                count += 1
        return page, count

    def _load(self, level: Level, uids: Sequence[str]) -> list[list[Entry]]:
        """Return the results of studies, series or instances. A result of several jobs is that of the newest job."""
        groups: dict[str, dict[str, Entry]] = {uid: {} for uid in uids}
        rows = {row.instance: row for row in reversed(self._index.of(level, uids))}
        for entry in self._read(list(reversed(rows.values()))):
            groups[entry.uid(UID_TAGS[level])][entry.uid(INSTANCE)] = entry
        return [list(group.values()) for group in groups.values() if group]

    # ---- index ----

    def _update(self) -> None:
        """Add the jobs that have succeeded since the last search to the index, and forget erased ones."""
        with self._update_lock:
            while jobs := self._index.missing(PAGE):
                found = self._queue.find(jobs)
                self._index.add({job: list(self._describe(found[job])) if job in found else [] for job in jobs})
        self._forget_erased()

    def _describe(self, job: Job) -> Iterator[IndexedInstance]:
        """Yield the rows of a job. A job whose scan was not DICOM has none."""
        if STRUCTURED_REPORT_NAME not in job.results:
            return
        for name in (name for name in DICOM_NAMES if name in job.results):
            for entry in self._result(job.id, name):
                optional = (entry.text(tag) for tag in (SOP_CLASS, MODALITY, STUDY_DATE))
                yield IndexedInstance(job.id, name, *map(entry.uid, (STUDY, SERIES, INSTANCE)), *optional)

    # ---- attributes ----

    def _read(self, rows: Sequence[IndexedInstance]) -> list[Entry]:
        return [entry for row in rows for entry in self._result(row.job, row.name)]

    def _result(self, job: str, name: str) -> tuple[Entry, ...]:
        def read() -> Iterator[Entry]:
            with self._open_result(job, name) as path:
                if path is not None:
                    yield from _read_entry(path, job, name, is_result=True)

        return self._cached((job, name), read)

    def _scan(self, job: str) -> tuple[Entry, ...]:
        def read() -> Iterator[Entry]:
            for path in self._store.scan_files(job):
                instance = identify(path)
                if instance is not None and instance.is_image:
                    yield from _read_entry(path, job, path.name, is_result=False)

        return self._cached((job, None), read)

    def _cached(self, key: tuple[str, str | None], read: Callable[[], Iterator[Entry]]) -> tuple[Entry, ...]:
        with self._lock:
            known = self._entries.get(key)
            if known is not None:
                self._entries.move_to_end(key)
                return known
        entries = tuple(read())
        with self._lock:
            self._count += len(entries) - len(self._entries.pop(key, ()))
            self._entries[key] = entries
            while self._count > CACHED_INSTANCES:
                self._count -= len(self._entries.popitem(last=False)[1])
        return entries

    def _forget_erased(self) -> None:
        """Remove the attributes of jobs that do not exist from memory, whichever process has erased them."""
        with self._lock:
            jobs = {job for job, _ in self._entries}
        erased = jobs.difference(self._queue.read_states(jobs) if jobs else ())
        with self._lock:
            for key in [key for key in self._entries if key[0] in erased]:
                self._count -= len(self._entries.pop(key))

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


def _read_entry(path: Path, job: str, name: str, *, is_result: bool) -> Iterator[Entry]:
    """Yield the entry of a file: nothing if the file is damaged, so that the other instances can still be found."""
    try:
        entry = Entry(job, name, is_result, read_attributes(path, KEYWORDS))
        for tag in UID_TAGS.values():  # pydicom reads a truncated file without an error
            entry.uid(tag)
    except (OSError, MemoryError):  # the file may be intact
        raise
    except Exception as error:  # noqa: BLE001 - for a damaged file, pydicom raises whatever its parts raise
        log.warning("instance not readable", job=job, result=name, **error_location(error))
    else:
        yield entry
