#!/usr/bin/env python3
"""Uploads that mean harm, sent to a running service: each is answered properly, in little memory.

    python -m scripts.prove_hostile --mib 2048

The API and its worker are two processes on loopback. The table has for every upload the answer of the
API or of the job, how long it took, and the most memory that the API had used by then. Leaves with 0
if each was answered as it should be, the API stayed below 300 MB, and nothing was written beside the
service's own folders.
"""

import argparse
import gzip
import io
import stat
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import nibabel as nib

from app.ingest.reader import DEFAULT_LIMITS
from scripts.fleet import URL, Node, fleet, follow
from tests.support.dicom import Series, write_series
from tests.support.phantom import brain

MIB = 1 << 20
MOST_MB = 300
SECONDS = 3600
MANY = 10_000
READ = "succeeded"

Send = Callable[[httpx2.Client], httpx2.Response]
# Where an archive's names point: none of these may appear.
OUTSIDE = ("../../escaped", "/tmp/counterpart-escaped", "..\\..\\escaped", "a/../../../escaped")


@dataclass(frozen=True)
class Attack:
    """One upload.

    Attributes
    ----------
    name : str
    send : callable
        Posts it.
    expected : str
        Code of the problem, or "succeeded".
    """

    name: str
    send: Send
    expected: str


def body(content: bytes | Callable[[], Iterator[bytes]]) -> Send:
    """The upload as the body of the request; a function makes it block by block."""

    def send(client: httpx2.Client) -> httpx2.Response:
        return client.post(URL, content=content if isinstance(content, bytes) else content())

    return send


def form(count: int) -> Send:
    """Very many tiny files as one form."""
    boundary = "counterpart-hostile"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="%d"\r\n\r\n'

    def parts() -> Iterator[bytes]:
        for number in range(count):
            yield (head % number).encode() + bytes(128) + b"DICM" + str(number).encode() + b"\r\n"
        yield f"--{boundary}--\r\n".encode()

    def send(client: httpx2.Client) -> httpx2.Response:
        kind = f"multipart/form-data; boundary={boundary}"
        return client.post(URL, content=parts(), headers={"Content-Type": kind})

    return send


def packed(files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of files by name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def bomb(mib: int) -> bytes:
    """A zip of zeros behind the first bytes of a DICOM file."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("scan", "w", force_zip64=True) as file,
    ):
        file.write(bytes(128) + b"DICM")
        for _ in range(mib):
            file.write(bytes(MIB))
    return out.getvalue()


def announced(mib: int) -> bytes:
    """A gzipped NIfTI whose header announces the moon, and zeros behind it."""
    content = bytearray(nifti()[:352])
    content[42:48] = b"\xff\x7f" * 3
    return gzip.compress(bytes(content) + bytes(mib * MIB), 1)


def encrypted(files: Mapping[str, bytes]) -> bytes:
    """A zip that says it is protected by a password."""
    content = bytearray(packed(files))
    content[6] |= 1  # the local header's flags
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        content[at + 8] |= 1  # the directory's
        at = content.find(b"PK\x01\x02", at + 1)
    return bytes(content)


def links(to: str) -> bytes:
    """A zip of symbolic links and nothing else."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number in range(3):
            entry = zipfile.ZipInfo(f"link{number}")
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, to)
    return out.getvalue()


def nifti() -> bytes:
    """A head that the synthetic model knows."""
    head = brain()
    return bytes(nib.Nifti1Image(head.array, head.affine).to_bytes())


def padded(mib: int, extra: int = 0) -> Callable[[], Iterator[bytes]]:
    """A scan, and zeros up to a size."""

    def blocks() -> Iterator[bytes]:
        start = nifti()
        yield start
        left, block = mib * MIB + extra - len(start), bytes(MIB)
        while left > 0:
            yield block[: min(left, MIB)]
            left -= MIB

    return blocks


def attacks(folder: Path, mib: int) -> list[Attack]:
    """Every upload, the largest last."""
    series = {path.name: path.read_bytes() for path in write_series(folder / "series", brain(), Series())}
    one = next(iter(series.values()))
    escaping = {f"{OUTSIDE[i % len(OUTSIDE)]}{i}": content for i, content in enumerate(series.values())}
    tiny = {f"{number % 97}/{number}": b"tiny" for number in range(MANY)}
    inflated = DEFAULT_LIMITS.max_inflated_bytes // MIB + 1
    inner = packed({"inner.zip": packed(series)})
    return [
        Attack("a series, as it should be", body(packed(series)), READ),
        Attack("names that climb out of the folder", body(packed(escaping)), READ),
        Attack("symbolic links in a zip", body(links("/etc/passwd")), "no_image_in_archive"),
        Attack("an archive in an archive", body(inner), "no_image_in_archive"),
        Attack("an encrypted archive", body(encrypted(series)), "unsafe_archive"),
        Attack("bzip2 in a zip", body(packed(series, zipfile.ZIP_BZIP2)), "unsafe_archive"),
        Attack("LZMA in a zip", body(packed(series, zipfile.ZIP_LZMA)), "unsafe_archive"),
        Attack("half an archive", body(packed(series)[: len(packed(series)) // 2]), "truncated_file"),
        Attack("ten thousand tiny files in a zip", body(packed(tiny)), "no_image_in_archive"),
        Attack("a series among them", body(packed({**tiny, **series})), READ),
        Attack("ten thousand tiny files as a form", form(MANY), "truncated_file"),
        Attack("more files than are accepted", form(20_001), "upload_too_large"),
        Attack("a DICOM file that ends early", body(one[: len(one) // 2]), "truncated_file"),
        Attack("a header that announces the moon", body(announced(min(mib, 256))), "too_many_voxels"),
        Attack(f"a zip that inflates to {inflated} MiB", body(bomb(inflated)), "unsafe_archive"),
        Attack(f"a scan in {mib} MiB", body(padded(mib)), READ),
        Attack(f"{mib} MiB and one byte", body(padded(mib, 1)), "upload_too_large"),
    ]


def peak_mb(node: Node) -> float:
    """Largest resident memory of a process so far."""
    lines = Path(f"/proc/{node.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


def answer_of(client: httpx2.Client, attack: Attack) -> tuple[int, str, str]:
    """Status, code and sentence: of the API where it refuses at once, else of the job."""
    response = attack.send(client)
    found: dict[str, Any] = response.json()
    if response.status_code != 202:
        return response.status_code, found.get("code", ""), found.get("found", "")
    job = follow(client, found["id"], time.monotonic() + SECONDS)
    problem = job["problem"] or {}
    return problem.get("status", 200), problem.get("code", job["state"]), problem.get("found", "")


def prove(folder: Path, mib: int) -> bool:
    """Send everything to one API and one worker; a table to standard output."""
    well = True
    every = attacks(folder, mib)
    with fleet(folder / "hostile", max_upload_mb=str(mib)) as service:
        node, worker = service.start("serve", "--no-worker"), service.start("worker")
        node.wait_until_ready()
        worker.wait_until_ready()
        print(f"API ready with {peak_mb(node):.0f} MB; worker {peak_mb(worker):.0f} MB")
        with httpx2.Client(base_url=node.base, timeout=SECONDS) as client:
            for attack in every:
                start = time.perf_counter()
                status, code, found = answer_of(client, attack)
                right = code == attack.expected
                well &= right and peak_mb(node) < MOST_MB
                seconds = time.perf_counter() - start
                print(
                    f"{attack.name:36s} {status} {code:20s} {seconds:6.1f} s  {peak_mb(node):4.0f} MB  {found}",
                    flush=True,
                )
                if not right:
                    print(f"    EXPECTED {attack.expected}")
            well &= client.get("/readyz").status_code == 200
        print(f"API at most {peak_mb(node):.0f} MB; worker at most {peak_mb(worker):.0f} MB")
    escaped = [*folder.parents[1].rglob("escaped*"), *Path("/tmp").glob("counterpart-escaped*")]
    well &= not escaped
    print(f"files written outside: {len(escaped)}")
    return well


def main() -> int:
    """Parse, prove, leave with 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=2048, help="largest upload, of the service and of the attacks")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="counterpart-hostile-") as folder:
        well = prove(Path(folder) / "in" / "here", wanted.mib)
    print("PROVED" if well else "FAILED")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
