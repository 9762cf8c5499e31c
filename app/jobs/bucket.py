"""Shared store of several machines: scans and results in an S3-compatible bucket.

::

    jobs/<job>/scan/000000 ...            complete upload, stored before it is acknowledged
    jobs/<job>/work-<random>/<name>       results of one attempt
    jobs/<job>/inferred/<name>            inference result (`app.inference_result`), until the results are published
    jobs/<job>/published                  name of the published attempt, created once and never changed
    erased/<job>                          job being erased: its row is deleted before this object
    check                                 block that the readiness check overwrites

A local folder holds uploads in progress and the scan that this process analyses. Endpoint and credentials come
from the environment, as for every S3 client (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ALLOW_HTTP), or from the machine's own role. Credentials can also be settings.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from app.errors import StoreUnavailable
from app.jobs.store import CHECK_BYTES, Slot, Store, StoredFile, Upload, file_or_folder

TRANSFER_THREADS = 16
# Bytes of one block of a download.
BLOCK_BYTES = 1 << 20
# Object that `check` overwrites.
CHECK_NAME = "check"


class BucketStore(Store):
    """Scans and results in a bucket.

    Parameters
    ----------
    url : str
        URL of the store, as "s3://bucket/prefix".
    scratch : Path
        Local folder for files in progress. If it is missing, it is created for its owner only.
    **credentials : str
        Options of the S3 client, such as `access_key_id`. They have precedence over the environment.
    """

    def __init__(self, url: str, scratch: Path, **credentials: str) -> None:
        super().__init__(scratch)
        self._bucket = S3Store.from_url(url, **credentials)  # type: ignore[arg-type]
        self._local_jobs = scratch / "jobs"

    def check(self) -> None:
        """Check that the local folder and the bucket are writable, by writing a block to each.

        Raises
        ------
        StoreUnavailable
        """
        super().check()
        with _store_errors():
            next(iter(obstore.list(self._bucket, "jobs/", chunk_size=1)), None)
            obstore.put(self._bucket, CHECK_NAME, bytes(CHECK_BYTES))

    def commit_upload(self, upload: Upload, job: str) -> None:
        """Make an upload the scan of a job. When this returns, the scan is in the bucket."""
        with _store_errors():
            self._put_all(sorted(upload.folder.iterdir()), f"jobs/{job}/scan")

    def scan_path(self, job: str) -> Path:
        """Download a job's scan and return its path: its only file, or the folder of its files."""
        folder = self._job_folder(job) / "scan"
        folder.mkdir(parents=True, exist_ok=True)
        with _store_errors():
            names = self._names(f"jobs/{job}/scan/")
            with ThreadPoolExecutor(TRANSFER_THREADS) as pool:
                list(pool.map(lambda name: self._get(name, folder / name.rpartition("/")[2]), names))
        return file_or_folder(folder)

    def create_work_folder(self, job: str) -> Path:
        """Create a local folder for the results of a new attempt, and remove those of earlier attempts."""
        self._job_folder(job).mkdir(parents=True, exist_ok=True)
        return super().create_work_folder(job)

    def save_intermediate(self, job: str, file: Path) -> str:
        """Upload an inference result. The local copy stays until `cleanup`."""
        name = super().save_intermediate(job, file)
        with _store_errors():
            self._put_all([self._job_folder(job) / name], f"jobs/{job}/inferred")
            self._clear_if_erased(job)
        return name

    def load_intermediate(self, job: str, name: str) -> Path | None:
        """Return a local copy of an inference result, or None if it no longer exists."""
        if (path := super().load_intermediate(job, name)) is not None:
            return path
        self._job_folder(job).mkdir(parents=True, exist_ok=True)
        part = self._job_folder(job) / f"{name}.part"
        try:
            with _store_errors():
                self._get(f"jobs/{job}/inferred/{name}", part)
        except FileNotFoundError:
            part.unlink(missing_ok=True)
            return None
        return part.rename(self._job_folder(job) / name)

    def discard_intermediate(self, job: str, name: str = "") -> None:
        """Remove one inference result of a job, or all if no name is given."""
        super().discard_intermediate(job, name)
        with _store_errors():
            names = [f"jobs/{job}/inferred/{name}"] if name else self._names(f"jobs/{job}/inferred/")
            self._delete(names)

    def stage(self, job: str, work: Path) -> str:
        """Upload an attempt's results, so that every worker can publish them, and return their name."""
        with _store_errors():
            self._put_all([path for path in work.iterdir() if path.is_file()], f"jobs/{job}/{work.name}")
            self._clear_if_erased(job)
        return work.name

    def _publish(self, job: str, work: str) -> None:
        """Record an attempt as the published one. Only the first record succeeds."""
        with _store_errors():
            try:
                obstore.put(self._bucket, f"jobs/{job}/published", work.encode(), mode="create")
            except AlreadyExistsError:
                if self._published(job) != work:
                    self._delete_prefix(f"jobs/{job}/{work}/")
            self._clear_if_erased(job)

    def fetch(self, job: str, name: str) -> StoredFile | None:
        """Download a published file and return the copy, or None if it does not exist. The caller closes it."""
        with _store_errors():
            work = self._published(job)
            if work is None:
                return None
            folder = self.root / "incoming" / uuid4().hex
            folder.mkdir()
            try:
                self._get(f"jobs/{job}/{work}/{name}", folder / name)
            except FileNotFoundError:
                shutil.rmtree(folder)
                return None
        return StoredFile(folder / name, folder)

    def discard_all_but_scan(self, job: str) -> None:
        """Remove everything of a job except its scan, published results included, because it was cancelled."""
        super().discard_all_but_scan(job)
        with _store_errors():
            self._delete([name for name in self._names(f"jobs/{job}/") if not name.startswith(f"jobs/{job}/scan/")])

    def begin_erasure(self, job: str) -> None:
        """Remove all objects of a job, and remember the erasure until `finish_erasure`."""
        with _store_errors():
            obstore.put(self._bucket, f"erased/{job}", b"")
        super().begin_erasure(job)
        self.clear_erased(job)

    def clear_erased(self, job: str) -> None:
        """Remove all objects of a job. The scan goes first: concurrent writers then clear what they wrote."""
        super().clear_erased(job)
        with _store_errors():
            self._delete_prefix(f"jobs/{job}/scan/")
            self._delete_prefix(f"jobs/{job}/")

    def finish_erasure(self, job: str) -> None:
        """Forget an erasure, because nothing of the job remains."""
        super().finish_erasure(job)
        with _store_errors():
            self._delete([f"erased/{job}"])

    def is_erased(self, job: str) -> bool:
        """Return whether the erasure of a job has begun and not finished. Its row is deleted before the end."""
        with _store_errors():
            return super().is_erased(job) or f"erased/{job}" in self._names("erased/")

    def unfinished_erasures(self) -> list[str]:
        """Return the jobs whose erasure has begun and not finished, on any machine."""
        with _store_errors():
            found = {name.rpartition("/")[2] for name in self._names("erased/")}
        return sorted(found.union(super().unfinished_erasures()))

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each job in the bucket."""
        sizes: Counter[str] = Counter()
        with _store_errors():
            for page in obstore.list(self._bucket, "jobs/"):
                for entry in page:
                    sizes[entry["path"].split("/")[1]] += entry["size"]
        return sizes

    def orphaned(self, before: float) -> list[str]:
        """Return jobs that have nothing but a scan from before a time in seconds since the epoch."""
        in_use: set[str] = set()
        old_scans: set[str] = set()
        with _store_errors():
            for page in obstore.list(self._bucket, "jobs/"):
                for entry in page:
                    _, job, part = entry["path"].split("/")[:3]
                    is_old_scan = part == "scan" and entry["last_modified"].timestamp() < before
                    (old_scans if is_old_scan else in_use).add(job)
        return sorted(old_scans - in_use)

    def cleanup(self, job: str) -> None:
        """Remove the local copies of an attempt that has ended."""
        shutil.rmtree(self._job_folder(job), ignore_errors=True)

    def acquire_slot(self) -> Slot:
        """Lock a name for this process, and clear its local folder of the files of a dead process."""
        slot = super().acquire_slot()
        self._local_jobs = self.root / "jobs" / slot.name
        shutil.rmtree(self._local_jobs, ignore_errors=True)
        self._local_jobs.mkdir()
        return slot

    def _job_folder(self, job: str) -> Path:
        return self._local_jobs / job

    def _put_all(self, paths: list[Path], prefix: str) -> None:
        with ThreadPoolExecutor(TRANSFER_THREADS) as pool:
            list(pool.map(lambda path: obstore.put(self._bucket, f"{prefix}/{path.name}", path), paths))

    def _get(self, name: str, path: Path) -> None:
        with path.open("wb") as file:
            for block in obstore.get(self._bucket, name).stream(min_chunk_size=BLOCK_BYTES):
                file.write(block)

    def _names(self, prefix: str) -> list[str]:
        return [entry["path"] for page in obstore.list(self._bucket, prefix) for entry in page]

    def _delete_prefix(self, prefix: str) -> None:
        self._delete(self._names(prefix))

    def _delete(self, names: list[str]) -> None:
        if names:
            obstore.delete(self._bucket, names)

    def _published(self, job: str) -> str | None:
        try:
            return bytes(obstore.get(self._bucket, f"jobs/{job}/published").bytes()).decode()
        except FileNotFoundError:
            return None

    def _clear_if_erased(self, job: str) -> None:
        """After a write, remove the job's objects if an erasure removed its scan in the meantime."""
        if not self._names(f"jobs/{job}/scan/"):
            self._delete_prefix(f"jobs/{job}/")
            raise FileNotFoundError(f"{job} was erased")


@contextmanager
def _store_errors() -> Iterator[None]:
    """Replace errors of the bucket's client, whose text contains addresses and paths."""
    try:
        yield
    except BaseError as error:
        raise StoreUnavailable(
            f"The bucket of the store does not answer as expected ({type(error).__name__}).",
            expected="an S3-compatible bucket that can be read and written.",
            advice="Check COUNTERPART_STORE, AWS_ENDPOINT_URL and the credentials.",
        ) from None
