"""Received instances on disk, from their arrival until their series is a job.

::

    node/receiving/<random>.dcm          instance in transfer
    node/series/<series>/<instance>      instances that wait for the rest of their series
    node/batches/<series>.<random>/      instances on their way into one job, taken by one rename
    node/senders/<series>.json           callers that sent instances of a series that is not a job yet
    node/handed/<series>.json            last job of the series, and the hashes of its instances

`app.pacs.incomplete` adds the marks of series that may be incomplete.

The names are hashes of UIDs, because a peer can send any text as a UID. A file is never changed after its rename.
One process at a time uses a spool.
"""

import fcntl
import hashlib
import json
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import structlog

from app.errors import AddressUnavailable, UploadTooLarge
from app.ingest.dicom.storage import Identifiers
from app.jobs.store import sync_to_disk
from app.pacs.incomplete import TransferFaults, TransferMarks

log = structlog.get_logger("counterpart.node")

# Age in seconds at which the rest of an interrupted transfer is removed. A transfer without a byte ends before.
STALE_SECONDS = 600.0
# Longest time in seconds since the last instance for which an open association delays its series.
MAX_HOLD_SECONDS = 600.0
MIB = 1 << 20


@dataclass(frozen=True)
class Sender:
    """Caller that sent an instance.

    Attributes
    ----------
    title : str
        AE title.
    address : str
    """

    title: str
    address: str


@dataclass(frozen=True)
class Batch:
    """Instances of one series on their way into one job.

    Attributes
    ----------
    folder : Path
    series : str
        Key of the series.
    name : str
        Random name of the batch.
    """

    folder: Path
    series: str
    name: str

    @property
    def files(self) -> list[Path]:
        """Files of the batch, in a fixed order."""
        return sorted(self.folder.iterdir())


@dataclass(frozen=True)
class HandedSeries:
    """Record of the last job of a series.

    Attributes
    ----------
    batch : str
        Name of the batch that became the job.
    job : str
    instances : dict of str to str
        SHA-256 of each file of the job, by key of the instance.
    caution : str
        Sentences in the job's note that say why the series may be incomplete. Empty if nothing indicates that.
    """

    batch: str
    job: str
    instances: dict[str, str]
    caution: str = ""


class Spool:
    """Folder of received instances. All methods can be called by several threads.

    Parameters
    ----------
    root : Path
        Folder of the spool. It is on the file system of the store, so that a job gets hard links.
    max_mb, max_files : int
        Limits of one series.

    Attributes
    ----------
    receiving : Path
        Folder of the instances in transfer.
    max_bytes : int
        Largest size of a series.

    Raises
    ------
    AddressUnavailable
        Another process uses the spool.
    """

    def __init__(self, root: Path, max_mb: int, max_files: int) -> None:
        self.root = root
        self.receiving = root / "receiving"
        self._series, self._batches, self._handed = root / "series", root / "batches", root / "handed"
        self._senders = root / "senders"
        self.max_bytes, self._max_files = max_mb * MIB, max_files
        self._mutex = threading.Lock()
        for folder in (self.receiving, self._series, self._batches, self._senders, self._handed):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_file = _lock(root / "lock")
        for path in self.receiving.iterdir():
            path.unlink(missing_ok=True)
        for path in self._senders.iterdir():
            self._forget_senders(path.stem)
        # For each waiting series: the time of the last arrival, by the clock of this process, and its size.
        now = time.monotonic()
        self._arrivals = {folder.name: now for folder in self._series.iterdir()}
        self._sizes = {key: _size(self._series / key) for key in self._arrivals}
        self._marks = TransferMarks(root, self._known_instances)

    def close(self) -> None:
        """Let another process use the spool."""
        self._lock_file.close()

    # ---- arrival ----

    def add(self, path: Path, identifiers: Identifiers, sender: Sender, association: str | None = None) -> None:
        """Move a received file to its series, and note its sender. When this returns, both survive a power failure.

        Parameters
        ----------
        path : Path
        identifiers : Identifiers
        sender : Sender
        association : str, optional
            Name of the association, a valid name of a file. The series counts as interrupted until the association goes
            on to another series or is released (`end_association`), also if this process dies before.

        Raises
        ------
        UploadTooLarge
            The series would have too many files or bytes.
        """
        key, size = identifiers.series_key, path.stat().st_size
        sync_to_disk(path)
        with self._mutex:
            self._check_size(key, size)
            if association is not None:
                self._marks.begin(association, key)
            self._add_sender(key, sender)
            folder = self._series / key
            is_new = not folder.exists()
            folder.mkdir(exist_ok=True)
            target = folder / identifiers.instance_key
            replaced = target.stat().st_size if target.exists() else None
            path.replace(target)
            sync_to_disk(folder, *((self._series,) if is_new else ()))
            files, total = self._sizes.get(key, (0, 0))
            self._sizes[key] = (files + (replaced is None), total + size - (replaced or 0))
            self._arrivals[key] = time.monotonic()
            self._marks.arrive(key, identifiers.instance_key, association)

    def _add_sender(self, key: str, sender: Sender) -> None:
        known = self.read_senders(key)
        if sender not in known:
            self._write(self._senders / f"{key}.json", [asdict(each) for each in (*known, sender)])

    def read_senders(self, key: str) -> tuple[Sender, ...]:
        """Return the callers that sent instances of a series that is not a job yet."""
        try:
            return tuple(Sender(**fields) for fields in json.loads((self._senders / f"{key}.json").read_bytes()))
        except FileNotFoundError:
            return ()

    def _forget_senders(self, key: str) -> None:
        """Remove the senders of a series, unless instances of it wait."""
        if not self._waits(key):
            (self._senders / f"{key}.json").unlink(missing_ok=True)

    def _waits(self, key: str) -> bool:
        return (self._series / key).exists() or any(self._batches.glob(f"{key}.*"))

    def _write(self, path: Path, document: object) -> None:
        """Write a JSON file, which exists completely or not at all after a power failure."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(document))
        sync_to_disk(part)
        part.rename(path)
        sync_to_disk(path.parent)

    def _check_size(self, key: str, size: int) -> None:
        files, total = self._sizes.get(key, (0, 0))
        if files >= self._max_files or total + size > self.max_bytes:
            raise UploadTooLarge(
                "A series has more files or bytes than one upload may have.",
                expected=f"at most {self._max_files} files and {self.max_bytes // MIB} MiB.",
                advice="Raise COUNTERPART_MAX_FILES or COUNTERPART_MAX_UPLOAD_MB.",
            )

    def end_series(self, keys: Iterable[str]) -> None:
        """Note that these series are complete, whatever the time of their last instance."""
        with self._mutex:
            self._arrivals |= {key: float("-inf") for key in keys if key in self._arrivals}

    # ---- incomplete series ----

    def refuse(self, identifiers: Identifiers) -> None:
        """Note that an instance is refused, until it arrives. Its sender still sends, so the quiet time begins again.

        An instance that arrived before is not missing, so there is no note. A refusal that is repeated does not delay
        the series again.
        """
        with self._mutex:
            self._refuse(identifiers.series_key, identifiers.instance_key)

    def refuse_unreadable(self, association: str, instance: str) -> None:
        """Note that an instance is refused whose series cannot be read: it counts for the series that is being sent.

        Parameters
        ----------
        association : str
            Name of the association.
        instance : str
            Key of the instance.
        """
        with self._mutex:
            series = self._marks.current_series(association)
            if series is not None:
                self._refuse(series, instance)

    def _refuse(self, key: str, instance: str) -> None:
        if self._marks.refuse(key, instance) and key in self._arrivals:
            self._arrivals[key] = time.monotonic()

    def end_association(self, association: str, *, released: bool) -> None:
        """Note the end of an association that sent instances.

        If it was not released, each of its series that still waits counts as interrupted. The quiet time of these
        series begins again, because the sender usually sends again.
        """
        with self._mutex:
            if released:
                self._marks.release(association)
                return
            for key in self._marks.abort(association, self._arrivals.__contains__):
                self._arrivals[key] = time.monotonic()

    def _known_instances(self, key: str) -> set[str]:
        """Return the keys of the instances of a series that wait, or that are in its last job."""
        handed = self.read_handed(key)
        known = set(handed.instances if handed is not None else ())
        for folder in (self._series / key, *self._batches.glob(f"{key}.*")):
            with suppress(FileNotFoundError):
                known |= {path.name for path in folder.iterdir()}
        return known

    def read_faults(self, key: str) -> TransferFaults:
        """Return the reasons why a series may be incomplete."""
        return self._marks.read(key)

    def _forget_faults(self, key: str) -> None:
        """Remove the marks of a series, unless instances of it wait."""
        if not self._waits(key):
            self._marks.forget(key)

    # ---- hand-over ----

    def quiet_series(self, seconds: float) -> list[str]:
        """Return the waiting series to which no instance was added for some seconds, the oldest first.

        A series is left out as long as an open association sends it, at most for `MAX_HOLD_SECONDS`. The time-out of a
        broken connection can be longer than the quiet time, and without this the series would seem complete.
        """
        now = time.monotonic()
        with self._mutex:
            held = self._marks.series_in_transfer()
            longest = max(seconds, MAX_HOLD_SECONDS)
            quiet = (key for key, at in self._arrivals.items() if at <= now - (longest if key in held else seconds))
            return sorted(quiet, key=self._arrivals.__getitem__)

    def take(self, key: str) -> Batch:
        """Take the instances of a waiting series, all at once. Instances that come later wait for the next batch.

        If this fails after the rename, `batches` returns the batch. If the folder was removed, the series no longer
        waits.

        Raises
        ------
        OSError
        """
        name = secrets.token_hex(8)
        batch = Batch(self._batches / f"{key}.{name}", key, name)
        with self._mutex:
            try:
                (self._series / key).rename(batch.folder)
            except FileNotFoundError:
                if not (self._series / key).exists():
                    log.warning("folder of a series was removed by another program")
                    del self._arrivals[key], self._sizes[key]
                raise
            # Before the next statement, which can fail: the folder is no longer there.
            del self._arrivals[key], self._sizes[key]
            sync_to_disk(self._series, self._batches)
        return batch

    def batches(self) -> list[Batch]:
        """Return the batches that are not jobs yet, the oldest first."""
        folders = sorted(self._batches.iterdir(), key=lambda folder: folder.stat().st_mtime)
        return [Batch(folder, *folder.name.split(".")) for folder in folders]

    def finish(self, batch: Batch, handed: HandedSeries) -> None:
        """Record the job of a batch, then remove the batch. The record decides what a restart does."""
        self._write(self._handed / f"{batch.series}.json", asdict(handed))
        self.discard(batch)

    def discard(self, batch: Batch) -> None:
        """Remove a batch whose job is recorded."""
        shutil.rmtree(batch.folder, ignore_errors=True)
        with self._mutex:
            self._forget_senders(batch.series)

    def read_handed(self, key: str) -> HandedSeries | None:
        """Return the record of the last job of a series, or None if there is none."""
        try:
            return HandedSeries(**json.loads((self._handed / f"{key}.json").read_bytes()))
        except FileNotFoundError:
            return None

    def handed_jobs(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the last job of each recorded series."""
        for path in self._handed.glob("*.json"):
            handed = self.read_handed(path.stem)
            if handed is not None:
                yield path.stem, handed.job

    def forget(self, key: str) -> None:
        """Remove the record of a series, because its job was erased."""
        (self._handed / f"{key}.json").unlink(missing_ok=True)
        with self._mutex:
            self._forget_faults(key)

    def remove_stale(self) -> None:
        """Remove the rest of interrupted transfers, and the marks of series of which nothing arrived."""
        before = time.time() - STALE_SECONDS
        with self._mutex:
            for key in self._marks.older_than(before):
                if not (self._handed / f"{key}.json").exists():
                    self._forget_faults(key)
        for path in self.receiving.iterdir():
            try:
                if path.stat().st_mtime < before:
                    path.unlink()
            except FileNotFoundError:
                continue

    def count_waiting(self) -> tuple[int, int]:
        """Return the number of waiting series, and the number of batches that are not jobs yet."""
        return len(self._arrivals), sum(1 for _ in self._batches.iterdir())

    def oldest_seconds(self) -> float:
        """Return the seconds since the last arrival in the series that waits for the longest time, 0 if none waits."""
        times = []
        for folder in (*self._series.iterdir(), *self._batches.iterdir()):
            with suppress(FileNotFoundError):  # it has become a job
                times.append(folder.stat().st_mtime)
        return max(0.0, time.time() - min(times)) if times else 0.0


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(folder: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in folder.iterdir()]
    return len(sizes), sum(sizes)


def _lock(path: Path) -> IO[bytes]:
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise AddressUnavailable(
            "Another process uses the spool of the DICOM node.",
            expected="one `counterpart node` for each store folder.",
            advice="Stop the other process, or give this one its own folder (COUNTERPART_SCRATCH with a bucket).",
        ) from None
    return file
