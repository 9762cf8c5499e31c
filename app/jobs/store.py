"""Where scans and results lie: one folder a job, everything written aside and then renamed.

::

    incoming/<random>/000000 ...    being received
    jobs/<job>/scan/000000 ...      the upload, whole and on disk before it is acknowledged
    jobs/<job>/work-<random>/       results being written
    jobs/<job>/inferred-<random>    what the networks made of it (`app.inference_result`), until there are results
    jobs/<job>/results/             published by one rename
    trash/<random>/                 being erased
    process-<n>.lock                held by a living process
    machine                         its name among the machines that share a database

File names of the caller are never used: they can hold a patient's name. The content's hash is the
job's identity (`Incoming.digest`), not the file's address, so that erasing a job erases its scan
without counting who else refers to it.
"""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from uuid import uuid4

from app.errors import StoreUnavailable
from app.jobs.incoming import Incoming

# What an interrupted upload left behind is swept at a start after this long: no upload lasts longer.
STALE_SECONDS = 24 * 3600
MOST_PROCESSES = 64
MOST_SYNCS = 32
# Beginning of the name of what was inferred.
HELD = "inferred-"


@dataclass(frozen=True)
class Slot:
    """A name that one living process holds; the system frees it when the process ends, however it does."""

    name: str
    descriptor: int

    def free(self) -> None:
        """Let another process have it."""
        os.close(self.descriptor)


@dataclass(frozen=True)
class Fetched:
    """A result to be read, and the temporary folder that it lies in, where it lies in one."""

    path: Path
    folder: Path | None = None

    def let_go(self) -> None:
        """Remove the temporary copy."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


class Store:
    """Scans and results in a local folder.

    Parameters
    ----------
    root : Path
        Created where it is missing, for its owner only: it holds scans of patients.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("incoming", "jobs", "trash"):
            (root / name).mkdir(exist_ok=True)

    @contextmanager
    def receive(self) -> Iterator[Incoming]:
        """A place for an upload; what was not kept by the end is gone."""
        folder = self.root / "incoming" / uuid4().hex
        folder.mkdir()
        incoming = Incoming(folder)
        try:
            yield incoming
        finally:
            incoming.close()
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, incoming: Incoming, job: str) -> None:
        """Make an upload the scan of a job; it survives a loss of power when this returns."""
        _sync(*incoming.folder.iterdir(), incoming.folder)
        self._job(job).mkdir()
        incoming.folder.rename(self._job(job) / "scan")
        _sync(self._job(job), self.root / "jobs")

    def scan(self, job: str) -> Path:
        """What `app.ingest.read` takes: the only file, or the folder of several."""
        return self._only(self._job(job) / "scan")

    def work(self, job: str) -> Path:
        """A new folder for results; what an attempt before this one left is removed."""
        for old in self._job(job).glob("work-*"):
            shutil.rmtree(old, ignore_errors=True)
        folder = self._job(job) / f"work-{uuid4().hex}"
        folder.mkdir()
        return folder

    def hold(self, job: str, inferred: Path) -> str:
        """Keep what was inferred on the disk, where any worker finds it; returns what `held` takes."""
        name = f"{HELD}{uuid4().hex}"
        _sync(inferred)
        # Fails where another worker has begun an attempt of its own since, or the job was erased.
        inferred.rename(self._job(job) / name)
        _sync(self._job(job))
        return name

    def held(self, job: str, name: str) -> Path | None:
        """What was inferred; None where it is gone."""
        path = self._job(job) / name
        return path if path.is_file() else None

    def release(self, job: str, name: str = "") -> None:
        """Remove what was inferred: by one attempt, or by all."""
        for path in self._job(job).glob(f"{name or HELD}*"):
            path.unlink(missing_ok=True)

    def stage(self, job: str, work: Path) -> str:
        """Put an attempt's results where any worker can publish them; returns what `publish` takes."""
        assert work.parent == self._job(job)
        return work.name

    def publish(self, job: str, work: str) -> None:
        """Make the folder `work` the results of a job, all at once; doing it again changes nothing.

        What was inferred is not needed any more, and goes.
        """
        self._publish(job, work)
        self.release(job)

    def _publish(self, job: str, work: str) -> None:
        results = self._job(job) / "results"
        source = self._job(job) / work
        if results.exists():
            shutil.rmtree(source, ignore_errors=True)
            return
        try:
            _sync(*source.iterdir(), source)
            source.rename(results)
        except OSError:
            # A worker that was taken for dead, and was not, may have published between the two looks.
            if not results.exists():
                raise
        _sync(self._job(job))

    def fetch(self, job: str, name: str) -> Fetched | None:
        """A published file; None where there is none."""
        path = self._job(job) / "results" / name
        return Fetched(path) if path.is_file() else None

    def read(self, job: str, name: str) -> bytes | None:
        """Content of a published file; None where there is none."""
        fetched = self.fetch(job, name)
        if fetched is None:
            return None
        try:
            return fetched.path.read_bytes()
        finally:
            fetched.let_go()

    def sizes(self) -> dict[str, int]:
        """Bytes of each job in the store."""
        return {
            folder.name: sum(path.lstat().st_size for path in folder.rglob("*"))
            for folder in (self.root / "jobs").iterdir()
        }

    def unclaimed(self, before: float) -> list[str]:
        """Jobs that have a scan from before then (seconds of the epoch), and nothing else.

        Those that never had a row in the database are among them.
        """
        return [
            folder.name
            for folder in (self.root / "jobs").iterdir()
            if folder.stat().st_mtime < before and not [path for path in folder.iterdir() if path.name != "scan"]
        ]

    def let_go(self, job: str) -> None:
        """Remove what an attempt alone needed."""

    def check(self) -> None:
        """See that the store can be written to.

        Raises
        ------
        StoreUnavailable
        """
        try:
            with TemporaryFile(dir=self.root / "incoming"):
                pass
        except OSError as error:
            raise StoreUnavailable(
                f"The store cannot be written to ({type(error).__name__}).",
                expected="a folder with room that this user may write to.",
                advice="Check COUNTERPART_STORE and its disk.",
            ) from None

    def erase(self, job: str) -> None:
        """Remove every trace of a job. The rename makes it vanish at once, even from under a writer."""
        grave = self.root / "trash" / uuid4().hex
        try:
            self._job(job).rename(grave)
        except FileNotFoundError:
            return
        shutil.rmtree(grave, ignore_errors=True)

    def take_slot(self) -> "Slot":
        """A name for this process that no other living one has, on any machine; a dead one's is free again."""
        machine = self._machine()
        for number in range(MOST_PROCESSES):
            descriptor = os.open(self.root / f"process-{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
            else:
                return Slot(f"{machine}-{number}", descriptor)
        raise RuntimeError(f"{MOST_PROCESSES} processes share one store")

    def sweep(self) -> None:
        """At a start: remove what uploads and erasures left when the process died in them."""
        before = time.time() - STALE_SECONDS
        for path in (self.root / "incoming").iterdir():
            if path.stat().st_mtime < before:
                shutil.rmtree(path, ignore_errors=True)
        for path in (self.root / "trash").iterdir():
            shutil.rmtree(path, ignore_errors=True)

    def _only(self, folder: Path) -> Path:
        return folder if (folder / "000001").exists() else folder / "000000"

    def _machine(self) -> str:
        """A name of this folder's machine, made at the first start."""
        try:
            with (self.root / "machine").open("x") as file:
                file.write(secrets.token_hex(4))
        except FileExistsError:
            pass
        return (self.root / "machine").read_text() or "machine"

    def _job(self, job: str) -> Path:
        return self.root / "jobs" / job


def _sync(*paths: Path) -> None:
    """Force files and folders' entries to the disk; together, or a thousand slices take seconds."""
    with ThreadPoolExecutor(min(len(paths), MOST_SYNCS)) as pool:
        list(pool.map(_sync_one, paths))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
