"""The store of many machines: scans and results in an S3-compatible bucket.

::

    jobs/<job>/scan/000000 ...            the upload, whole before it is acknowledged
    jobs/<job>/work-<random>/<name>       results of one attempt
    jobs/<job>/inferred/<name>            what the networks made of it (`app.inference_result`), until there are results
    jobs/<job>/published                  names the attempt that counts; made once, never changed

A local folder holds what is under way: uploads, and the scan that this process analyses. Endpoint and
credentials come from the environment, as every S3 client reads them (AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ALLOW_HTTP, or the machine's own role).
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
from app.jobs.incoming import Incoming
from app.jobs.store import Fetched, Slot, Store

MOST_TRANSFERS = 16
# Bytes read at once from the bucket.
CHUNK = 1 << 20


class BucketStore(Store):
    """Scans and results in a bucket.

    Parameters
    ----------
    url : str
        s3://bucket/prefix
    scratch : Path
        Local folder for what is under way; created where it is missing, for its owner only.
    """

    def __init__(self, url: str, scratch: Path) -> None:
        super().__init__(scratch)
        self._bucket = S3Store.from_url(url)
        self._desk = scratch / "jobs"

    def check(self) -> None:
        """See that the bucket answers.

        Raises
        ------
        StoreUnavailable
        """
        with _told():
            next(iter(obstore.list(self._bucket, "jobs/", chunk_size=1)), None)

    def keep(self, incoming: Incoming, job: str) -> None:
        """Make an upload the scan of a job; it is in the bucket when this returns."""
        with _told():
            self._put_all(sorted(incoming.folder.iterdir()), f"jobs/{job}/scan")

    def scan(self, job: str) -> Path:
        """What `app.ingest.read` takes: the only file, or the folder of several; fetched for this attempt."""
        folder = self._job(job) / "scan"
        folder.mkdir(parents=True, exist_ok=True)
        with _told():
            names = self._names(f"jobs/{job}/scan/")
            with ThreadPoolExecutor(MOST_TRANSFERS) as pool:
                list(pool.map(lambda name: self._get(name, folder / name.rpartition("/")[2]), names))
        return self._only(folder)

    def work(self, job: str) -> Path:
        """A new folder for results; what an attempt before this one left is removed."""
        self._job(job).mkdir(parents=True, exist_ok=True)
        return super().work(job)

    def hold(self, job: str, inferred: Path) -> str:
        """Bring what was inferred into the bucket; this machine keeps a copy until it lets go of the job."""
        name = super().hold(job, inferred)
        with _told():
            self._put_all([self._job(job) / name], f"jobs/{job}/inferred")
            self._clear_if_erased(job)
        return name

    def held(self, job: str, name: str) -> Path | None:
        """What was inferred, fetched where another machine did it; None where it is gone."""
        if (found := super().held(job, name)) is not None:
            return found
        self._job(job).mkdir(parents=True, exist_ok=True)
        part = self._job(job) / f"{name}.part"
        try:
            with _told():
                self._get(f"jobs/{job}/inferred/{name}", part)
        except FileNotFoundError:
            part.unlink(missing_ok=True)
            return None
        return part.rename(self._job(job) / name)

    def release(self, job: str, name: str = "") -> None:
        """Remove what was inferred: by one attempt, or by all."""
        super().release(job, name)
        with _told():
            names = [f"jobs/{job}/inferred/{name}"] if name else self._names(f"jobs/{job}/inferred/")
            self._delete_all(names)

    def stage(self, job: str, work: Path) -> str:
        """Bring an attempt's results into the bucket, where any worker can publish them."""
        with _told():
            self._put_all([path for path in work.iterdir() if path.is_file()], f"jobs/{job}/{work.name}")
            self._clear_if_erased(job)
        return work.name

    def _publish(self, job: str, work: str) -> None:
        """Let an attempt be the one that counts; only the first ever does."""
        with _told():
            try:
                obstore.put(self._bucket, f"jobs/{job}/published", work.encode(), mode="create")
            except AlreadyExistsError:
                if self._published(job) != work:
                    self._delete(f"jobs/{job}/{work}/")
            self._clear_if_erased(job)

    def fetch(self, job: str, name: str) -> Fetched | None:
        """A published file in a local copy that the caller lets go of; None where there is none."""
        with _told():
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
        return Fetched(folder / name, folder)

    def erase(self, job: str) -> None:
        """Remove every trace of a job. The scan goes first: who still writes results looks for it, and clears."""
        with _told():
            self._delete(f"jobs/{job}/scan/")
            self._delete(f"jobs/{job}/")
        super().erase(job)

    def sizes(self) -> dict[str, int]:
        """Bytes of each job in the bucket."""
        found: Counter[str] = Counter()
        with _told():
            for page in obstore.list(self._bucket, "jobs/"):
                for entry in page:
                    found[entry["path"].split("/")[1]] += entry["size"]
        return found

    def unclaimed(self, before: float) -> list[str]:
        """Jobs that have a scan from before then (seconds of the epoch), and nothing else."""
        claimed: set[str] = set()
        found: set[str] = set()
        with _told():
            for page in obstore.list(self._bucket, "jobs/"):
                for entry in page:
                    _, job, part = entry["path"].split("/")[:3]
                    old = part == "scan" and entry["last_modified"].timestamp() < before
                    (found if old else claimed).add(job)
        return sorted(found - claimed)

    def let_go(self, job: str) -> None:
        """Remove the local copy when an attempt has ended."""
        shutil.rmtree(self._job(job), ignore_errors=True)

    def take_slot(self) -> Slot:
        """A name for this process, with a desk of its own that is cleared of what a dead one left."""
        slot = super().take_slot()
        self._desk = self.root / "jobs" / slot.name
        shutil.rmtree(self._desk, ignore_errors=True)
        self._desk.mkdir()
        return slot

    # ---- inside ----

    def _job(self, job: str) -> Path:
        return self._desk / job

    def _put_all(self, paths: list[Path], prefix: str) -> None:
        with ThreadPoolExecutor(MOST_TRANSFERS) as pool:
            list(pool.map(lambda path: obstore.put(self._bucket, f"{prefix}/{path.name}", path), paths))

    def _get(self, name: str, path: Path) -> None:
        with path.open("wb") as file:
            for chunk in obstore.get(self._bucket, name).stream(min_chunk_size=CHUNK):
                file.write(chunk)

    def _names(self, prefix: str) -> list[str]:
        return [entry["path"] for page in obstore.list(self._bucket, prefix) for entry in page]

    def _delete(self, prefix: str) -> None:
        self._delete_all(self._names(prefix))

    def _delete_all(self, names: list[str]) -> None:
        if names:
            obstore.delete(self._bucket, names)

    def _published(self, job: str) -> str | None:
        try:
            return bytes(obstore.get(self._bucket, f"jobs/{job}/published").bytes()).decode()
        except FileNotFoundError:
            return None

    def _clear_if_erased(self, job: str) -> None:
        """After writing: an erasure that came between has removed the scan before it listed the rest."""
        if not self._names(f"jobs/{job}/scan/"):
            self._delete(f"jobs/{job}/")
            raise FileNotFoundError(f"{job} was erased")


@contextmanager
def _told() -> Iterator[None]:
    """Name the broken part: what the bucket's client raises holds addresses and paths."""
    try:
        yield
    except BaseError as error:
        raise StoreUnavailable(
            f"The bucket of the store does not answer as it should ({type(error).__name__}).",
            expected="an S3-compatible bucket that can be read and written.",
            advice="Check COUNTERPART_STORE, and AWS_ENDPOINT_URL and the credentials beside it.",
        ) from None
