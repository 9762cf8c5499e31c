"""Proof: hostile uploads to a running service get the right answer, in little memory.

    python -m tests.proofs.hostile --mib 2048

The API and its worker are two processes on loopback. The table has, for each upload, the answer of the API or of the
job, its time, and the peak memory of the API so far. The proof holds if every answer is the expected one, the API
stays below 300 MB, and no file appears outside the service's folders.
"""

import gzip
import io
import stat
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import nibabel as nib

from app.ingest.reader import DEFAULT_LIMITS
from tests.proofs.deployment import URL, ServiceProcess, deploy, print_row, run_proof, wait_until_ended
from tests.support.dicom import Series, write_series
from tests.support.phantom import brain

MIB = 1 << 20
MAX_API_MB = 300
TIMEOUT_SECONDS = 3600
MANY = 10_000

Post = Callable[[httpx2.Client], httpx2.Response]
# Names in an archive that point outside its folder. No such file may appear.
OUTSIDE = ("../../escaped", "/tmp/counterpart-escaped", "..\\..\\escaped", "a/../../../escaped")


@dataclass(frozen=True)
class HostileUpload:
    """One upload and its expected answer.

    Attributes
    ----------
    name : str
    post : callable
        Sends the upload.
    expected : str
        Error code, or "succeeded".
    """

    name: str
    post: Post
    expected: str


def as_body(content: bytes | Callable[[], Iterator[bytes]]) -> Post:
    """Return a function that sends the upload as the body. A callable yields its blocks."""

    def post(client: httpx2.Client) -> httpx2.Response:
        return client.post(URL, content=content if isinstance(content, bytes) else content())

    return post


def as_form(count: int) -> Post:
    """Return a function that sends many tiny files as one form."""
    boundary = "counterpart-hostile"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="%d"\r\n\r\n'

    def parts() -> Iterator[bytes]:
        for number in range(count):
            yield (head % number).encode() + bytes(128) + b"DICM" + str(number).encode() + b"\r\n"
        yield f"--{boundary}--\r\n".encode()

    def post(client: httpx2.Client) -> httpx2.Response:
        kind = f"multipart/form-data; boundary={boundary}"
        return client.post(URL, content=parts(), headers={"Content-Type": kind})

    return post


def make_zip(files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip of files by name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def make_zip_bomb(mib: int) -> bytes:
    """Return a zip of the first bytes of a DICOM file and many zeros."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("scan", "w", force_zip64=True) as file,
    ):
        file.write(bytes(128) + b"DICM")
        for _ in range(mib):
            file.write(bytes(MIB))
    return out.getvalue()


def make_huge_header(mib: int) -> bytes:
    """Return a gzipped NIfTI file whose header has the largest dimensions, and zeros behind it."""
    content = bytearray(make_nifti()[:352])
    content[42:48] = b"\xff\x7f" * 3
    return gzip.compress(bytes(content) + bytes(mib * MIB), 1)


def make_encrypted_zip(files: Mapping[str, bytes]) -> bytes:
    """Return a zip whose flags mark it as encrypted."""
    content = bytearray(make_zip(files))
    content[6] |= 1  # flags of the local header
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        content[at + 8] |= 1  # flags of the central directory
        at = content.find(b"PK\x01\x02", at + 1)
    return bytes(content)


def make_zip_of_links(target: str) -> bytes:
    """Return a zip of symbolic links."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number in range(3):
            entry = zipfile.ZipInfo(f"link{number}")
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, target)
    return out.getvalue()


def make_nifti() -> bytes:
    """Return a head that the tiny bundle accepts."""
    head = brain()
    return bytes(nib.Nifti1Image(head.array, head.affine).to_bytes())


def pad_nifti(mib: int, extra: int = 0) -> Callable[[], Iterator[bytes]]:
    """Return a generator function of a scan that zeros extend to a size in MiB plus some bytes."""

    def blocks() -> Iterator[bytes]:
        start = make_nifti()
        yield start
        left, block = mib * MIB + extra - len(start), bytes(MIB)
        while left > 0:
            yield block[: min(left, MIB)]
            left -= MIB

    return blocks


def make_uploads(folder: Path, mib: int) -> list[HostileUpload]:
    """Return all uploads, the largest last."""
    series = {path.name: path.read_bytes() for path in write_series(folder / "series", brain(), Series())}
    one = next(iter(series.values()))
    escaping = {f"{OUTSIDE[i % len(OUTSIDE)]}{i}": content for i, content in enumerate(series.values())}
    tiny = {f"{number % 97}/{number}": b"tiny" for number in range(MANY)}
    inflated = DEFAULT_LIMITS.max_inflated_bytes // MIB + 1
    nested = make_zip({"inner.zip": make_zip(series)})
    half_zip = make_zip(series)[: len(make_zip(series)) // 2]
    return [
        HostileUpload("a correct series", as_body(make_zip(series)), "succeeded"),
        HostileUpload("names that leave the folder", as_body(make_zip(escaping)), "succeeded"),
        HostileUpload("symbolic links in a zip", as_body(make_zip_of_links("/etc/passwd")), "no_image_in_archive"),
        HostileUpload("an archive in an archive", as_body(nested), "no_image_in_archive"),
        HostileUpload("an encrypted archive", as_body(make_encrypted_zip(series)), "unsafe_archive"),
        HostileUpload("bzip2 in a zip", as_body(make_zip(series, zipfile.ZIP_BZIP2)), "unsafe_archive"),
        HostileUpload("LZMA in a zip", as_body(make_zip(series, zipfile.ZIP_LZMA)), "unsafe_archive"),
        HostileUpload("half an archive", as_body(half_zip), "truncated_file"),
        HostileUpload("ten thousand tiny files in a zip", as_body(make_zip(tiny)), "no_image_in_archive"),
        HostileUpload("a series among them", as_body(make_zip({**tiny, **series})), "succeeded"),
        HostileUpload("ten thousand tiny files as a form", as_form(MANY), "truncated_file"),
        HostileUpload("more files than are accepted", as_form(20_001), "upload_too_large"),
        HostileUpload("a truncated DICOM file", as_body(one[: len(one) // 2]), "truncated_file"),
        HostileUpload("a header with huge dimensions", as_body(make_huge_header(min(mib, 256))), "too_many_voxels"),
        HostileUpload(f"a zip that inflates to {inflated} MiB", as_body(make_zip_bomb(inflated)), "unsafe_archive"),
        HostileUpload(f"a scan in {mib} MiB", as_body(pad_nifti(mib)), "succeeded"),
        HostileUpload(f"{mib} MiB and one byte", as_body(pad_nifti(mib, 1)), "upload_too_large"),
    ]


def peak_mb(service: ServiceProcess) -> float:
    """Return the peak resident memory of a process so far, in MB."""
    lines = Path(f"/proc/{service.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


def send(client: httpx2.Client, upload: HostileUpload) -> tuple[int, str, str]:
    """Send an upload. Return status, code and text of the API's refusal or of the ended job."""
    response = upload.post(client)
    answer: dict[str, Any] = response.json()
    if response.status_code != 202:
        return response.status_code, answer.get("code", ""), answer.get("found", "")
    job = wait_until_ended(client, answer["id"], time.monotonic() + TIMEOUT_SECONDS)
    problem = job["problem"] or {}
    return problem.get("status", 200), problem.get("code", job["state"]), problem.get("found", "")


def prove(folder: Path, *, mib: int = 2048) -> bool:
    """Send every upload to one API and one worker, print the table and return whether the proof holds."""
    folder = folder / "in" / "here"  # two levels, so that an escaped file stays below the folder of the proof
    uploads = make_uploads(folder, mib)
    holds = True
    with deploy(folder / "hostile", max_upload_mb=str(mib)) as deployment:
        api, worker = deployment.start("serve", "--no-worker"), deployment.start("worker")
        api.wait_until_ready()
        worker.wait_until_ready()
        print_row("ready", f"API {peak_mb(api):.0f} MB; worker {peak_mb(worker):.0f} MB")
        with httpx2.Client(base_url=api.url, timeout=TIMEOUT_SECONDS) as client:
            for upload in uploads:
                start = time.perf_counter()
                status, code, found = send(client, upload)
                seconds, peak = time.perf_counter() - start, peak_mb(api)
                print_row(f"{upload.name:36s}", f"{status} {code:20s} {seconds:6.1f} s  {peak:4.0f} MB  {found}")
                if code != upload.expected:
                    print_row("FAILURE", f"expected {upload.expected}")
                holds &= code == upload.expected and peak < MAX_API_MB
            holds &= client.get("/readyz").status_code == 200
        print_row("peak", f"API {peak_mb(api):.0f} MB; worker {peak_mb(worker):.0f} MB")
    escaped = [*folder.parents[1].rglob("escaped*"), *Path("/tmp").glob("counterpart-escaped*")]
    print_row("files outside", len(escaped))
    return holds and not escaped


if __name__ == "__main__":
    sys.exit(run_proof(prove, __doc__))
