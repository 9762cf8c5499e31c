"""Fuzz test of `app.ingest`: mutated scans must be read, or refused by a `CounterpartError`.

    python -m tests.proofs.fuzz_ingest --count 5000 --seed 1

Mutants are made from the real files in the folder COUNTERPART_DATA only. A child process reads them. A finding is a
mutant that takes too long, kills the process or raises any other exception, and memory that grows from mutant to
mutant. The file of each finding is kept. The exit status is 1 if there is a finding.
"""

import argparse
import ctypes
import gc
import gzip
import io
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from training.data import unpack_archive

MODULE = "tests.proofs.fuzz_ingest"
CHECKOUT = Path(__file__).resolve().parents[2]
# Reading one file takes at most one second, but the machine may be busy.
MAX_SECONDS = 30.0
# Larger files make the run longer and find no more, because faults lie in the header or the codec.
MAX_SEED_BYTES = 2_000_000
# A leak of tens of kilobytes with each broken file is to be found. Memory is compared between the first mutants after
# the warm-up, when every codec has been used, and the last ones. Measuring it takes ten times as long as reading a
# mutant, so only every tenth is measured.
WARM_UP_MUTANTS = 500
MEASURE_EVERY = 10
MEASUREMENTS = 10
MAX_GROWTH_MB = 10

Mutation = Callable[[bytearray, np.random.Generator], bytes]


@dataclass
class Outcome:
    """Result of a run.

    Attributes
    ----------
    codes : Counter
        Number of mutants for each error code, and for "read".
    findings : list of str
        Faults.
    growth_mb : float
        Memory of the child at the end minus that after the warm-up.
    """

    codes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    growth_mb: float = 0.0


def flip(content: bytearray, rng: np.random.Generator) -> bytes:
    """Change bytes at random, half of them near the start."""
    for _ in range(rng.integers(1, 20)):
        limit = len(content) if rng.random() < 0.5 else min(4000, len(content))
        content[int(rng.integers(limit))] = int(rng.integers(256))
    return bytes(content)


def cut(content: bytearray, rng: np.random.Generator) -> bytes:
    """Truncate."""
    return bytes(content[: int(rng.integers(len(content)))])


def extreme(content: bytearray, rng: np.random.Generator) -> bytes:
    """Set lengths and counts to extreme values."""
    for _ in range(rng.integers(1, 4)):
        width = int(rng.choice([1, 2, 4, 8]))
        value = [b"\xff" * width, bytes(width), b"\x7f" + b"\xff" * (width - 1), b"\x80" + bytes(width - 1)]
        at = int(rng.integers(max(1, min(3000, len(content)) - width)))
        content[at : at + width] = value[int(rng.integers(4))]
    return bytes(content)


def insert(content: bytearray, rng: np.random.Generator) -> bytes:
    """Insert noise."""
    at = int(rng.integers(len(content)))
    return bytes(content[:at]) + rng.bytes(int(rng.integers(1, 600))) + bytes(content[at:])


def repeat(content: bytearray, rng: np.random.Generator) -> bytes:
    """Overwrite bytes by the bytes before them."""
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 2000))
    content[at + length : at + 2 * length] = content[at : at + length]
    return bytes(content)


def drop(content: bytearray, rng: np.random.Generator) -> bytes:
    """Remove bytes."""
    at = int(rng.integers(len(content)))
    del content[at : at + int(rng.integers(1, 500))]
    return bytes(content)


def announce(content: bytearray, rng: np.random.Generator) -> bytes:
    """State enormous sizes where the format has its sizes: NIfTI, MGH, DICOM or a zip."""
    nifti, zip_entry = content.find(b"n+1\0"), content.find(b"PK\1\2")
    if nifti == NIFTI_MAGIC:
        at = int(rng.choice([42, 44, 46, 48, 70, 76, 80, 108, 112, 123, 252, 254, 280]))
    elif zip_entry >= 0:
        at = zip_entry + int(rng.choice([10, 20, 24, 42]))
    else:
        tags = [content.find(tag) for tag in SIZE_TAGS]
        found = [at for at in tags if at >= 0]
        at = (int(rng.choice(found)) + 8) if found else 4
    value = [b"\xff\xff", b"\xff\x7f", b"\0\0", b"\1\0", b"\0\0\x80\x7f", b"\xff\xff\xff\x7f"][int(rng.integers(6))]
    content[at : at + len(value)] = value
    return bytes(content)


def recode_text(content: bytearray, rng: np.random.Generator) -> bytes:
    """Declare another character set, and put bytes that do not fit into texts."""
    declared = content.find(b"ISO_IR 100")
    if declared >= 0:
        sets = [b"ISO_IR 192", b"ISO_IR 13 ", b"GB18030   ", b"ISO_IR 999", b"\\\\\\       "]
        content[declared : declared + 10] = sets[int(rng.integers(len(sets)))]
    for vr in (b"PN", b"LO", b"DS", b"IS"):
        at = content.find(vr, int(rng.integers(min(4000, len(content)))))
        if at >= 0:
            text = [b"\xc3\x28\xff", b"1,5", b"\x1b$B\x1b", b"\0\0\0"][int(rng.integers(4))]
            content[at + 4 : at + 4 + len(text)] = text
    return bytes(content)


def change_series(content: bytearray, rng: np.random.Generator) -> bytes:
    """Repeat, drop or jitter files of a series in a zip."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = [archive.read(name) for name in archive.namelist()]
    except Exception:  # noqa: BLE001 - not a zip, or damaged by another mutation
        return flip(content, rng)
    for _ in range(rng.integers(1, 6)):
        chosen, kind = int(rng.integers(len(files))), int(rng.integers(4))
        if kind == 0:
            files.append(files[chosen])
        elif kind == 1:
            files.append(files[chosen][:-50] + rng.bytes(50))  # the same identifier, other pixels
        elif kind == 2 and len(files) > 1:
            del files[chosen]
        else:
            files[chosen] = _jitter(files[chosen], rng)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number, file in enumerate(files):
            archive.writestr(f"{number}", file)
    return packed.getvalue()


def _jitter(file: bytes, rng: np.random.Generator) -> bytes:
    """Change one digit of position, orientation or spacing."""
    tag = GEOMETRY_TAGS[int(rng.integers(len(GEOMETRY_TAGS)))]
    at = file.find(tag)
    digits = [i for i in range(at + 8, min(at + 80, len(file))) if chr(file[i]).isdigit()] if at >= 0 else []
    if not digits:
        return file
    changed = bytearray(file)
    changed[int(rng.choice(digits))] = ord("0") + int(rng.integers(10))
    return bytes(changed)


# Rows, Columns, NumberOfFrames, BitsAllocated and the pixel data of little endian DICOM.
SIZE_TAGS = tuple(bytes.fromhex(tag) for tag in ("28001000", "28001100", "28000800", "28000001", "e07f1000"))
# ImagePositionPatient, ImageOrientationPatient, PixelSpacing.
GEOMETRY_TAGS = tuple(bytes.fromhex(tag) for tag in ("20003200", "20003700", "28003000"))
NIFTI_MAGIC = 344
MUTATIONS: tuple[Mutation, ...] = (flip, cut, extreme, insert, repeat, drop, announce, recode_text, change_series)


def seeds(data: Path, scratch: Path) -> list[Path]:
    """Return the files to mutate: DICOM files of the archives, small NIfTI files, and a zip of a short series, an
    uncompressed NIfTI file and a zip of a pair."""
    for path in sorted((data / "dicom").glob("*.tar.xz")):
        unpack_archive(path, scratch / path.name.removesuffix(".tar.xz"))
    files = [path for path in scratch.rglob("*.dcm") if path.stat().st_size <= MAX_SEED_BYTES]
    # A few slices of a long series are enough.
    few = [path for path in files if "1" in path.stem[-2:] or len(list(path.parent.glob("*.dcm"))) < 60]
    packed = scratch / "series.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(scratch.rglob("compressed_rle/001/*.dcm")):
            archive.writestr(path.name, path.read_bytes())
    volumes = [path for path in (data / "nifti_misc").glob("*.nii.gz") if path.stat().st_size <= MAX_SEED_BYTES]
    # Faults of sizes, pairs and series need the few files that can show them, so these are taken more often.
    special = [packed, *_plain_seeds(volumes, scratch)] * max(1, len(few) // 8)
    return sorted([*few, *volumes, *special])


def _plain_seeds(volumes: Sequence[Path], scratch: Path) -> list[Path]:
    """Return an uncompressed volume, whose header mutations reach, and a zip of it as a pair."""
    smallest = min(volumes, key=lambda path: (path.stat().st_size, path.name))
    content = gzip.decompress(smallest.read_bytes())[: 4 * MAX_SEED_BYTES]
    plain, pair = scratch / "plain.nii", scratch / "pair.zip"
    plain.write_bytes(content)
    with zipfile.ZipFile(pair, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.hdr", content[:NIFTI_MAGIC] + b"ni1\0")
        archive.writestr("a.img", content[NIFTI_MAGIC + 8 :])
    return [plain, pair]


def mutants(originals: Sequence[Path], count: int, seed: int, folder: Path) -> Iterator[Path]:
    """Write `count` mutants. Each depends only on the seed and its number."""
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        content = bytearray(originals[int(rng.integers(len(originals)))].read_bytes())
        for _ in range(rng.integers(1, 3)):
            content = bytearray(MUTATIONS[int(rng.integers(len(MUTATIONS)))](content, rng) or b"\0")
        path = folder / f"{number:05d}"
        path.write_bytes(content)
        yield path


def fuzz(originals: Sequence[Path], count: int, seed: int, keep: Path | None = None) -> Outcome:
    """Read mutants in a child process.

    Parameters
    ----------
    originals : sequence of Path
        Files to mutate.
    count, seed : int
        Number of mutants, and the seed: the same numbers give the same bytes.
    keep : Path, optional
        Folder to which the files of findings are copied.
    """
    outcome = Outcome()
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        child = _Child(Path(folder) / "scratch")
        for number, path in enumerate(mutants(originals, count, seed, Path(folder))):
            code, found, mb = child.read(path)
            outcome.codes[code] += 1
            if found:
                outcome.findings.append(f"mutant {number} of seed {seed}: {found}")
                if keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, keep / f"{seed}-{number:05d}")
            elif mb is not None and number >= WARM_UP_MUTANTS:
                memory.append(mb)
            path.unlink()
        child.stop()
    if len(memory) > MEASUREMENTS:
        outcome.growth_mb = float(np.median(memory[-MEASUREMENTS:]) - np.median(memory[:MEASUREMENTS]))
        if outcome.growth_mb > MAX_GROWTH_MB:
            outcome.findings.append(f"memory grew by {outcome.growth_mb:.0f} MB")
    return outcome


class _Child:
    """Process that reads one path from each line of its input. It is restarted if it exits."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._process: subprocess.Popen[str] | None = None

    def read(self, path: Path) -> tuple[str, str, float | None]:
        """Return the code, the finding (or an empty string), and the child's memory in MB if it was measured."""
        child = self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"{path}\n")
        child.stdin.flush()
        if not select.select([child.stdout], [], [], MAX_SECONDS)[0]:
            self.stop()
            return "hang", f"took more than {MAX_SECONDS:.0f} s", None
        line = child.stdout.readline()
        if not line:
            status = child.wait()
            self._process = None
            return "crash", f"the process exited with {status}", None
        answer = json.loads(line)
        return answer["code"], answer["found"], answer["mb"]

    def stop(self) -> None:
        """Kill the process."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, "--child", str(self._scratch)],
                cwd=CHECKOUT,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert self._process.stdout is not None
            self._process.stdout.readline()  # its imports are done, so they do not count as time of a mutant
        return self._process


def resident_mb() -> float:
    """Return the resident memory of this process, after Python and the allocator have returned what they can."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def serve_parent(scratch: Path) -> None:
    """Read each path from standard input, and answer with one line of JSON."""
    from app.api.problems import status_of
    from app.errors import CounterpartError
    from app.ingest.dicom import reader as dicom_reader
    from app.ingest.reader import read_scan

    assert dicom_reader  # imported now, because that takes longer than reading a mutant
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        found = ""
        try:
            read_scan(Path(line.rstrip("\n")), scratch=scratch, geometry="resample")
            code = "read"
        except CounterpartError as error:
            code = error.code
            if status_of(type(error)) >= 500:
                found = f"{code} is answered with {status_of(type(error))}"
        except Exception as error:  # noqa: BLE001 - any other exception is a finding
            code, found = "exception", f"{type(error).__name__}: {error}"
        shutil.rmtree(scratch, ignore_errors=True)
        mb = None if number % MEASURE_EVERY else resident_mb()
        print(json.dumps({"code": code, "found": found, "mb": mb}), flush=True)


def main() -> None:
    """Run the fuzz test from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="folder for the files of findings")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve_parent(options.child)
        return
    data = Path(os.environ["COUNTERPART_DATA"])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        outcome = fuzz(seeds(data, Path(scratch)), options.count, options.seed, options.keep)
    for code, count in outcome.codes.most_common():
        print(f"{count:6d} {code}")
    seconds = time.perf_counter() - start
    print(
        f"{options.count} mutants of seed {options.seed} in {seconds:.0f} s, memory grew by {outcome.growth_mb:.0f} MB"
    )
    for finding in outcome.findings:
        print(f"FOUND {finding}")
    sys.exit(bool(outcome.findings))


if __name__ == "__main__":
    main()
