"""Python client of the HTTP API: send a scan, wait for its job, get results as nibabel images, bytes or a report.

    from app.client import Client

    client = Client("http://127.0.0.1:8000")
    job = client.wait(client.send("scan.nii.gz", model="t1"))
    mask = client.image(job, "mask.nii.gz")

It needs requests and nibabel, and no other module of Counterpart.
"""

import gzip
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal, Self
from urllib.parse import urljoin
from uuid import uuid4

import nibabel as nib
import requests
from requests.auth import AuthBase

TOKEN_VARIABLE = "COUNTERPART_TOKEN"  # noqa: S105
# Status codes whose responses have the header Retry-After.
RETRY_STATUSES = frozenset({429, 503})
# Seconds without Retry-After.
DEFAULT_RETRY_SECONDS = 5.0
# Seconds for a connection, and without a byte of an answer. The service may hash a large upload before it answers.
CONNECT_SECONDS, READ_SECONDS = 10.0, 300.0
# Seconds between two requests for the state of a job. They grow from the first to the second number.
POLL_SECONDS, MAX_POLL_SECONDS = 0.25, 2.0
GZIP_MAGIC = b"\x1f\x8b"
BLOCK_BYTES = 1 << 20

Verdict = Literal["right", "wrong", "unsure"]


class CounterpartProblem(Exception):
    """Refusal of the service, or the cause why a job failed.

    Attributes
    ----------
    status : int
        HTTP status.
    code : str
        Stable identifier of the cause (docs/api.md). `http_STATUS` if the answer is not one of the service, but of a
        proxy before it.
    title, found, expected, advice : str
        Sentences about the cause and the next step.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.status = int(document["status"])
        self.code = str(document["code"])
        self.title = str(document["title"])
        self.found = str(document["found"])
        self.expected = str(document["expected"])
        self.advice = str(document["advice"])
        super().__init__(f"{self.code}: {self.found} Expected: {self.expected} {self.advice}")


@dataclass(frozen=True)
class Job:
    """Analysis of one scan, as the service last described it.

    Attributes
    ----------
    id : str
    state : str
        "queued", "running", "succeeded", "failed" or "cancelled".
    document : dict
        Everything that the service states about the job (docs/api.md).
    """

    id: str
    state: str
    document: dict[str, Any]


class Client:
    """Client of one service. Use it in one thread at a time.

    Parameters
    ----------
    url : str
        Address of the service, with the path prefix of its proxy if there is one.
    token : str, optional
        By default, the value of COUNTERPART_TOKEN, if there is one.
    patience : float
        Seconds for which a call that the service refuses with 429 or 503 is repeated, when Retry-After states it.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", token: str | None = None, *, patience: float = 120.0
    ) -> None:
        self._url = url.rstrip("/") + "/"
        self._patience = patience
        self._session = requests.Session()
        token = token or os.environ.get(TOKEN_VARIABLE)
        if token:
            self._session.auth = _BearerAuth(token)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- jobs ----

    def send(self, scan: Path | str | bytes, *, idempotency_key: str | None = None, **parameters: Any) -> Job:
        """Send a scan. The same scan and parameters return the same job.

        Parameters
        ----------
        scan : path or bytes
            A file that the service reads, its content, or a folder of DICOM files, which is sent as a zip.
        idempotency_key : str, optional
            Name of the job, instead of its content.
        **parameters
            `model`, `series`, `seed`, `geometry`, `priority` (docs/api.md).

        Raises
        ------
        CounterpartProblem
        """
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        answer = self._call("POST", "v1/scans", params=parameters, headers=headers, body=_body(scan))
        return _job(answer)

    def send_sample(self) -> Job:
        """Send the sample scan of the service.

        Raises
        ------
        CounterpartProblem
            For example, the service has no sample (`missing_extra`).
        """
        return _job(self._call("POST", "v1/scans/sample"))

    def get(self, job: Job | str) -> Job:
        """Return the present state of a job.

        Raises
        ------
        CounterpartProblem
        """
        return _job(self._call("GET", _path(job)))

    def jobs(self, **filters: Any) -> Iterator[Job]:
        """Yield the jobs that match all filters, newest first. `limit` is the size of a page, not of the list.

        Raises
        ------
        CounterpartProblem
        """
        path: str | None = "v1/scans"
        while path:
            page = self._call("GET", path, params=filters).json()
            yield from (Job(document["id"], document["state"], document) for document in page["scans"])
            path, filters = page["next"], {}  # the path of the next page has the filters

    def wait(self, job: Job | str, timeout: float | None = None) -> Job:
        """Wait until a job has succeeded, and return it.

        Parameters
        ----------
        job : Job or str
        timeout : float, optional
            Seconds. By default, the wait has no limit.

        Raises
        ------
        CounterpartProblem
            The job has failed, or was cancelled (`cancelled`).
        TimeoutError
            The job continues. It can be waited for again.
        """
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        pause = POLL_SECONDS
        while True:
            found = self.get(job)
            if found.state == "succeeded":
                return found
            if found.state in {"failed", "cancelled"}:
                raise CounterpartProblem(found.document["problem"] or _CANCELLED)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"The job is {found.state} after {timeout:g} s.")
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, MAX_POLL_SECONDS)

    def cancel(self, job: Job | str) -> Job:
        """Cancel a job that is queued or running.

        Raises
        ------
        CounterpartProblem
        """
        return _job(self._call("POST", f"{_path(job)}/cancel"))

    def erase(self, job: Job | str) -> None:
        """Erase a job with its scan, its results and its reviews.

        Raises
        ------
        CounterpartProblem
        """
        self._call("DELETE", _path(job))

    # ---- results ----

    def result(self, job: Job | str, name: str) -> bytes:
        """Return the content of a result file, such as "preview.png".

        Raises
        ------
        CounterpartProblem
            For example, the scan has no such result.
        """
        return self._call("GET", f"{_path(job)}/{name}").content

    def save(self, job: Job | str, name: str, path: Path | str) -> None:
        """Write a result file to a path, block by block. The path changes only when the file is complete.

        Raises
        ------
        CounterpartProblem
        requests.RequestException
            The connection ended before the file was complete.
        """
        target = Path(path)
        part = target.with_name(f".{target.name[:200]}.{uuid4().hex}.part")
        try:
            with self._call("GET", f"{_path(job)}/{name}", stream=True) as answer, part.open("xb") as file:
                file.writelines(answer.iter_content(BLOCK_BYTES))
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def image(self, job: Job | str, name: str) -> nib.Nifti1Image:
        """Return a NIfTI result, such as "mask.nii.gz", as an image in memory.

        Raises
        ------
        CounterpartProblem
        """
        content = self.result(job, name)
        if content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
        return nib.Nifti1Image.from_bytes(content)

    def report(self, job: Job | str) -> dict[str, Any]:
        """Return report.json.

        Raises
        ------
        CounterpartProblem
        """
        document: dict[str, Any] = self._call("GET", f"{_path(job)}/report.json").json()
        return document

    def review(self, job: Job | str, label: int, verdict: Verdict, *, note: str = "", reader: str = "") -> None:
        """Record the verdict of a reader on a finding.

        Raises
        ------
        CounterpartProblem
        """
        review = {"verdict": verdict, "note": note, "reader": reader}
        self._call("PUT", f"{_path(job)}/reviews/{label}", json=review)

    # ---- calls ----

    def _call(self, method: str, path: str, body: "_Body | None" = None, **options: Any) -> requests.Response:
        """Return the answer to a call. Repeat it while the service states that it may succeed later.

        Raises
        ------
        CounterpartProblem
        requests.RequestException
            The service cannot be reached.
        """
        deadline = time.monotonic() + self._patience
        while True:
            answer = self._send(method, path, body, options)
            if answer.ok:
                return answer
            seconds = _retry_seconds(answer)
            if answer.status_code not in RETRY_STATUSES or time.monotonic() + seconds > deadline:
                raise CounterpartProblem(_problem(answer))
            time.sleep(seconds)

    def _send(self, method: str, path: str, body: "_Body | None", options: Mapping[str, Any]) -> requests.Response:
        url, timeout = urljoin(self._url, path), (CONNECT_SECONDS, READ_SECONDS)
        if body is None:
            return self._session.request(method, url, timeout=timeout, **options)
        with body() as data:
            return self._session.request(method, url, timeout=timeout, data=data, **options)


# Opens the body of an upload, once for each attempt.
_Body = Callable[[], AbstractContextManager[IO[bytes]]]

_CANCELLED = {
    "status": 409,
    "code": "cancelled",
    "title": "Cancelled",
    "found": "The job was cancelled.",
    "expected": "a job that succeeds.",
    "advice": "Send the scan again.",
}


class _BearerAuth(AuthBase):
    """Header with the token. Unlike a header of the session, ~/.netrc does not replace it."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _body(scan: Path | str | bytes) -> _Body:
    if isinstance(scan, bytes):
        return lambda: BytesIO(scan)
    path = Path(scan)
    return (lambda: _zip(path)) if path.is_dir() else lambda: path.open("rb")


def _zip(folder: Path) -> IO[bytes]:
    """Return a temporary zip of all files of a folder, without their names, which can contain a patient's name."""
    file = TemporaryFile()  # noqa: SIM115  # the caller closes it
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
            archive.write(path, f"{number:06d}")
    file.seek(0)
    return file


def _path(job: Job | str) -> str:
    return f"v1/scans/{job.id if isinstance(job, Job) else job}"


def _job(answer: requests.Response) -> Job:
    document = answer.json()
    return Job(document["id"], document["state"], document)


def _retry_seconds(answer: requests.Response) -> float:
    stated = answer.headers.get("Retry-After", "")
    return float(stated) if stated.isdecimal() else DEFAULT_RETRY_SECONDS


def _problem(answer: requests.Response) -> dict[str, Any]:
    """Return the problem of a refusal, also if a proxy sent it."""
    if answer.headers.get("Content-Type", "").startswith("application/problem+json"):
        document: dict[str, Any] = answer.json()
        return document
    return {
        "status": answer.status_code,
        "code": f"http_{answer.status_code}",
        "title": "Answer of another server",
        "found": f"The answer has status {answer.status_code} and does not come from Counterpart.",
        "expected": "an answer of the service.",
        "advice": "Check the address of the service, and the proxy before it.",
    }
