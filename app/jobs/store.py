"""Local store of scans and results: one folder for each job. Files are written aside and then renamed.

::

    incoming/<random>/000000 ...    upload in progress
    jobs/<job>/scan/000000 ...      complete upload, on disk before it is acknowledged
    jobs/<job>/work-<random>/       results being written by one attempt
    jobs/<job>/inferred-<random>    inference result (`app.jobs.engine`), until the results are published
    jobs/<job>/results/             published results, created by one rename
    trash/<job>.<random>/           job being erased: its row is deleted before this folder
    process-<n>.lock                locked by a live process
    machine                         name of this machine among those that share a database

The store never uses the caller's file names, which can contain a patient's name. A folder is named after its job
and not after its content, so that erasing a job erases its scan without counting references.
"""

import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO
from uuid import uuid4

from app.errors import StoreUnavailable
from app.ingest.reader import HEAD_BYTES

# Age at which the rest of an interrupted upload is removed at a start. No upload takes longer.
STALE_SECONDS = 24 * 3600
MAX_PROCESSES = 64
# A full disk still creates empty files.
CHECK_BYTES = 1 << 16
SYNC_THREADS = 32
ERASE_ATTEMPTS = 4
# The prefix of the name of a job's inference result.
INTERMEDIATE_PREFIX = "inferred-"


class Upload:
    """An upload in progress: files without names, hashed while they are written to disk.

    Attributes
    ----------
    folder : Path
        Folder with the files 000000, 000001, ...
    heads : list of bytes
        First `app.ingest.HEAD_BYTES` bytes of each file.
    size : int
        Total size of all files in bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.heads: list[bytes] = []
        self.size = 0
        self._digests: list[str] = []
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()

    def begin(self) -> None:
        """Start the next file."""
        self._file = (self.folder / f"{len(self.heads):06d}").open("wb")
        self._hash = hashlib.sha256()
        self.heads.append(b"")

    def write(self, data: bytes) -> None:
        """Append data to the current file."""
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
        missing = HEAD_BYTES - len(self.heads[-1])
        if missing > 0:
            self.heads[-1] += data[:missing]

    def add_file(self, path: Path) -> None:
        """Add a complete file: by a hard link, or by a copy on another file system. Its content must never change."""
        target = self.folder / f"{len(self.heads):06d}"
        try:
            target.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, target)
        with target.open("rb") as file:
            self.heads.append(file.read(HEAD_BYTES))
            file.seek(0)
            self._digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        self.size += target.stat().st_size

    def end(self) -> None:
        """Finish the current file."""
        self.close()
        self._digests.append(self._hash.hexdigest())

    def close(self) -> None:
        """Close the current file, whether it is complete or not."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of all files, independent of their order: slices can arrive in any order."""
        return hashlib.sha256("".join(sorted(self._digests)).encode()).hexdigest()


@dataclass(frozen=True)
class Slot:
    """A name that one live process holds by a file lock. The system releases the lock when the process ends."""

    name: str
    descriptor: int

    def release(self) -> None:
        """Release the lock, so that another process can take the name."""
        os.close(self.descriptor)


@dataclass(frozen=True)
class StoredFile:
    """A published file for reading, and the temporary folder that contains it, if it is a copy."""

    path: Path
    temporary_folder: Path | None = None

    def close(self) -> None:
        """Remove the temporary copy, if there is one."""
        if self.temporary_folder is not None:
            shutil.rmtree(self.temporary_folder, ignore_errors=True)


class Store:
    """Scans and results in a local folder.

    Parameters
    ----------
    root : Path
        Folder of the store. If it is missing, it is created for its owner only, because it holds patients' scans.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("incoming", "jobs", "trash"):
            (root / name).mkdir(exist_ok=True)

    @contextmanager
    def receive_upload(self) -> Iterator[Upload]:
        """Yield a new upload. Unless it is committed, its files are removed at the end."""
        folder = self.root / "incoming" / uuid4().hex
        folder.mkdir()
        upload = Upload(folder)
        try:
            yield upload
        finally:
            upload.close()
            shutil.rmtree(folder, ignore_errors=True)

    def commit_upload(self, upload: Upload, job: str) -> None:
        """Make an upload the scan of a job. When this returns, the scan survives a power failure."""
        sync_to_disk(*upload.folder.iterdir(), upload.folder)
        self._job_folder(job).mkdir()
        upload.folder.rename(self._job_folder(job) / "scan")
        sync_to_disk(self._job_folder(job), self.root / "jobs")

    def scan_path(self, job: str) -> Path:
        """Return the path of a job's scan for the reader: its only file, or the folder of its files."""
        return file_or_folder(self._job_folder(job) / "scan")

    def scan_files(self, job: str) -> list[Path]:
        """Return the files of a job's scan: none after its erasure, and none if the store is a bucket."""
        folder = self._job_folder(job) / "scan"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def create_work_folder(self, job: str) -> Path:
        """Create a folder for the results of a new attempt, and remove those of earlier attempts."""
        for old in self._job_folder(job).glob("work-*"):
            shutil.rmtree(old, ignore_errors=True)
        folder = self._job_folder(job) / f"work-{uuid4().hex}"
        folder.mkdir()
        return folder

    def save_intermediate(self, job: str, file: Path) -> str:
        """Move an inference result into the store, where every worker can load it.

        Returns
        -------
        str
            Name of the inference result for `load_intermediate`.

        Raises
        ------
        FileNotFoundError
            Another worker has started an attempt in the meantime, or the job was erased.
        """
        name = f"{INTERMEDIATE_PREFIX}{uuid4().hex}"
        sync_to_disk(file)
        file.rename(self._job_folder(job) / name)
        sync_to_disk(self._job_folder(job))
        return name

    def load_intermediate(self, job: str, name: str) -> Path | None:
        """Return the path of an inference result, or None if it no longer exists."""
        path = self._job_folder(job) / name
        return path if path.is_file() else None

    def discard_intermediate(self, job: str, name: str = "") -> None:
        """Remove one inference result of a job, or all if no name is given."""
        for path in self._job_folder(job).glob(f"{name or INTERMEDIATE_PREFIX}*"):
            path.unlink(missing_ok=True)

    def discard_all_but_scan(self, job: str) -> None:
        """Remove everything of a job except its scan, published results included, because it was cancelled."""
        for path in self._job_folder(job).glob("*"):
            if path.name == "scan":
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def stage(self, job: str, work: Path) -> str:
        """Put an attempt's results where every worker can publish them, and return their name for `publish`."""
        assert work.parent == self._job_folder(job)
        return work.name

    def publish(self, job: str, work: str) -> None:
        """Publish staged results as the results of a job, all at once, and discard its inference results.

        Publishing is idempotent: the first published results stay.
        """
        self._publish(job, work)
        self.discard_intermediate(job)

    def _publish(self, job: str, work: str) -> None:
        results = self._job_folder(job) / "results"
        source = self._job_folder(job) / work
        if results.exists():
            shutil.rmtree(source, ignore_errors=True)
            return
        try:
            sync_to_disk(*source.iterdir(), source)
            source.rename(results)
        except OSError:
            # A slow worker that lost its lease may have published between the check and the rename.
            if not results.exists():
                raise
        sync_to_disk(self._job_folder(job))

    def fetch(self, job: str, name: str) -> StoredFile | None:
        """Return a published file, or None if it does not exist. The caller closes it."""
        path = self._job_folder(job) / "results" / name
        return StoredFile(path) if path.is_file() else None

    def read(self, job: str, name: str) -> bytes | None:
        """Return the content of a published file, or None if it does not exist."""
        file = self.fetch(job, name)
        if file is None:
            return None
        try:
            return file.path.read_bytes()
        finally:
            file.close()

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each job in the store."""
        return {
            folder.name: sum(path.lstat().st_size for path in folder.rglob("*"))
            for folder in (self.root / "jobs").iterdir()
        }

    def orphaned(self, before: float) -> list[str]:
        """Return jobs that have nothing but a scan from before a time in seconds since the epoch.

        They include the uploads that have no row in the database. The caller checks which ones.
        """
        return [
            folder.name
            for folder in (self.root / "jobs").iterdir()
            if folder.stat().st_mtime < before and not [path for path in folder.iterdir() if path.name != "scan"]
        ]

    def cleanup(self, job: str) -> None:
        """Remove the local copies of an attempt that has ended. A local store has none."""

    def check(self) -> None:
        """Check that the store is writable, by writing a block.

        Raises
        ------
        StoreUnavailable
        """
        try:
            with TemporaryFile(dir=self.root / "incoming") as file:
                file.write(bytes(CHECK_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreUnavailable(
                f"The store is not writable ({type(error).__name__}).",
                expected="a folder with free space that this user may write to.",
                advice="Check COUNTERPART_STORE and its disk.",
            ) from None

    def erase(self, job: str) -> None:
        """Remove all files of a job that has no row."""
        self.begin_erasure(job)
        self.finish_erasure(job)

    def begin_erasure(self, job: str) -> None:
        """Make all files of a job disappear, and remember the erasure until `finish_erasure`.

        One rename removes them at once, even while a worker writes. It needs no free disk space.
        """
        try:
            self._job_folder(job).rename(self.root / "trash" / f"{job}.{uuid4().hex}")
        except FileNotFoundError:
            return
        sync_to_disk(self._job_folder(job).parent, self.root / "trash")

    def clear_erased(self, job: str) -> None:
        """Free the disk space of a job being erased.

        Raises
        ------
        StoreUnavailable
            A file cannot be removed.
        """
        for trash in self._trash(job):
            for attempt in range(ERASE_ATTEMPTS):
                for path in trash.glob("*"):
                    shutil.rmtree(path, ignore_errors=True)
                    if path.is_file():
                        path.unlink(missing_ok=True)
                if not any(trash.glob("*")):
                    break
                time.sleep(0.1 * attempt)  # another process may remove the same files
            else:
                raise StoreUnavailable(
                    "Files of an erased job could not be removed.",
                    expected="files that this user may remove.",
                    advice="Check the rights and the disk of COUNTERPART_STORE. The erasure is repeated.",
                )

    def finish_erasure(self, job: str) -> None:
        """Forget an erasure, because nothing of the job remains.

        Raises
        ------
        StoreUnavailable
            A file cannot be removed. The erasure stays unfinished.
        """
        self.clear_erased(job)
        for trash in self._trash(job):
            shutil.rmtree(trash, ignore_errors=True)

    def is_erased(self, job: str) -> bool:
        """Return whether the erasure of a job has begun and not finished. Its row is deleted before the end."""
        return bool(self._trash(job))

    def unfinished_erasures(self) -> list[str]:
        """Return the jobs whose erasure has begun and not finished, for example because the process died."""
        return sorted({path.name.partition(".")[0] for path in (self.root / "trash").glob("*.*")})

    def acquire_slot(self) -> "Slot":
        """Lock and return a name that no other live process has, on any machine. Names are reused."""
        machine = self._machine_name()
        for number in range(MAX_PROCESSES):
            descriptor = os.open(self.root / f"process-{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
            else:
                return Slot(f"{machine}-{number}", descriptor)
        raise RuntimeError(f"{MAX_PROCESSES} processes already use this store")

    def sweep(self) -> None:
        """Remove stale uploads of processes that ended. Called at each start."""
        before = time.time() - STALE_SECONDS
        for path in (self.root / "incoming").iterdir():
            with suppress(FileNotFoundError):  # another process may commit or remove its upload at this moment
                if path.stat().st_mtime < before:
                    shutil.rmtree(path, ignore_errors=True)
        for path in (self.root / "trash").iterdir():
            if "." not in path.name:  # of version 0.1.0, which deleted the row first
                shutil.rmtree(path, ignore_errors=True)

    def _machine_name(self) -> str:
        """Return this machine's name, which the first start creates."""
        try:
            with (self.root / "machine").open("x") as file:
                file.write(secrets.token_hex(4))
        except FileExistsError:
            pass
        return (self.root / "machine").read_text() or "machine"

    def _trash(self, job: str) -> list[Path]:
        return list((self.root / "trash").glob(f"{job}.*"))

    def _job_folder(self, job: str) -> Path:
        return self.root / "jobs" / job


def is_open_to_others(folder: Path) -> bool:
    """Return whether a folder exists and other users of the machine may read it or write to it."""
    return folder.is_dir() and bool(folder.stat().st_mode & 0o077)


def file_or_folder(folder: Path) -> Path:
    """Return the only file of a scan's folder, or the folder if it has several files."""
    return folder if (folder / "000001").exists() else folder / "000000"


def sync_to_disk(*paths: Path) -> None:
    """Force files and directory entries to disk, in parallel, because a thousand slices one by one take seconds."""
    if len(paths) == 1:
        _sync_one(*paths)
        return
    with ThreadPoolExecutor(min(len(paths), SYNC_THREADS)) as pool:
        list(pool.map(_sync_one, paths))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
