"""Mutated scans into `app.ingest.read`: every one must be read, or refused by an error of ours.

    python scripts/fuzz_ingest.py --count 5000 --seed 1

Mutants are made of the real files below COUNTERPART_DATA (default ../shared/data) and of nothing else.
A child process reads them; one that takes too long or kills its process is a finding, and so is an
exception that is not `CounterpartError`, and memory that grows from mutant to mutant. Each finding's
file is kept. Ends with 1 where there was one.
"""

import argparse
import ctypes
import gc
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

from training.archives import unpack

# Reading one file takes a second at most; a loaded machine takes its time.
SECONDS_A_MUTANT = 30.0
# Larger files only make the run longer: what decides is in the header, or in the codec.
LARGEST_SEED = 2_000_000
# Memory after the first mutants, when every codec has met most of what it can meet, and at the end. What is looked
# for is a buffer that is lost with each broken file, tens of kilobytes at a time. To tell it takes ten times as long
# as to read a mutant, so it is told of every tenth.
WARM_UP = 500
TOLD_EVERY = 10
SOME = 10
MOST_GROWTH_MB = 10

Mutation = Callable[[bytearray, np.random.Generator], bytes]


@dataclass
class Outcome:
    """What a run found.

    Attributes
    ----------
    codes : Counter
        How often each code of an error came out, or "read".
    findings : list of str
        What must not be.
    grown_mb : float
        Memory that the child holds at the end, less that after the warm-up.
    """

    codes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    grown_mb: float = 0.0


def flip(content: bytearray, rng: np.random.Generator) -> bytes:
    """Some bytes anywhere, most of them near the start."""
    for _ in range(rng.integers(1, 20)):
        reach = len(content) if rng.random() < 0.5 else min(4000, len(content))
        content[int(rng.integers(reach))] = int(rng.integers(256))
    return bytes(content)


def cut(content: bytearray, rng: np.random.Generator) -> bytes:
    """Break off."""
    return bytes(content[: int(rng.integers(len(content)))])


def extreme(content: bytearray, rng: np.random.Generator) -> bytes:
    """Lengths and counts as large, small or negative as they can be."""
    for _ in range(rng.integers(1, 4)):
        width = int(rng.choice([1, 2, 4, 8]))
        value = [b"\xff" * width, bytes(width), b"\x7f" + b"\xff" * (width - 1), b"\x80" + bytes(width - 1)]
        at = int(rng.integers(max(1, min(3000, len(content)) - width)))
        content[at : at + width] = value[int(rng.integers(4))]
    return bytes(content)


def insert(content: bytearray, rng: np.random.Generator) -> bytes:
    """Put noise between."""
    at = int(rng.integers(len(content)))
    return bytes(content[:at]) + rng.bytes(int(rng.integers(1, 600))) + bytes(content[at:])


def repeat(content: bytearray, rng: np.random.Generator) -> bytes:
    """A piece twice, over what followed it."""
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 2000))
    content[at + length : at + 2 * length] = content[at : at + length]
    return bytes(content)


def drop(content: bytearray, rng: np.random.Generator) -> bytes:
    """A piece missing."""
    at = int(rng.integers(len(content)))
    del content[at : at + int(rng.integers(1, 500))]
    return bytes(content)


MUTATIONS: tuple[Mutation, ...] = (flip, cut, extreme, insert, repeat, drop)


def seeds(data: Path, scratch: Path) -> list[Path]:
    """Files to mutate: the archives' DICOM files, small NIfTI files, and a zip of a short series."""
    for path in sorted((data / "dicom").glob("*.tar.xz")):
        unpack(path, scratch / path.name.removesuffix(".tar.xz"))
    files = [path for path in scratch.rglob("*.dcm") if path.stat().st_size <= LARGEST_SEED]
    # Of a series, a few slices are as good as all.
    few = [path for path in files if "1" in path.stem[-2:] or len(list(path.parent.glob("*.dcm"))) < 60]
    packed = scratch / "series.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(scratch.rglob("compressed_rle/001/*.dcm")):
            archive.writestr(path.name, path.read_bytes())
    volumes = [path for path in (data / "nifti_misc").glob("*.nii.gz") if path.stat().st_size <= LARGEST_SEED]
    return sorted([*few, packed, *volumes])


def mutants(of: Sequence[Path], count: int, seed: int, folder: Path) -> Iterator[Path]:
    """Write `count` mutants, each by its own number."""
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        content = bytearray(of[int(rng.integers(len(of)))].read_bytes())
        for _ in range(rng.integers(1, 3)):
            content = bytearray(MUTATIONS[int(rng.integers(len(MUTATIONS)))](content, rng) or b"\0")
        path = folder / f"{number:05d}"
        path.write_bytes(content)
        yield path


def fuzz(of: Sequence[Path], count: int, seed: int, keep: Path | None = None) -> Outcome:
    """Read mutants in a child process.

    Parameters
    ----------
    of : sequence of Path
        Files to mutate.
    count, seed : int
        How many, and which: the same numbers give the same bytes.
    keep : Path, optional
        Where the files of findings are copied.
    """
    outcome = Outcome()
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        child = _Child(Path(folder) / "scratch")
        for number, path in enumerate(mutants(of, count, seed, Path(folder))):
            code, found, mb = child.read(path)
            outcome.codes[code] += 1
            if found:
                outcome.findings.append(f"mutant {number} of seed {seed}: {found}")
                if keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, keep / f"{seed}-{number:05d}")
            elif mb is not None and number >= WARM_UP:
                memory.append(mb)
            path.unlink()
        child.stop()
    if len(memory) > SOME:
        outcome.grown_mb = float(np.median(memory[-SOME:]) - np.median(memory[:SOME]))
        if outcome.grown_mb > MOST_GROWTH_MB:
            outcome.findings.append(f"memory grew by {outcome.grown_mb:.0f} MB")
    return outcome


class _Child:
    """A process that reads what it is told to, one path a line; started anew when it is lost."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._process: subprocess.Popen[str] | None = None

    def read(self, path: Path) -> tuple[str, str, float | None]:
        """Code, finding or nothing, and the child's memory in MB where it told."""
        child = self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"{path}\n")
        child.stdin.flush()
        if not select.select([child.stdout], [], [], SECONDS_A_MUTANT)[0]:
            self.stop()
            return "hang", f"took more than {SECONDS_A_MUTANT:.0f} s", None
        line = child.stdout.readline()
        if not line:
            status = child.wait()
            self._process = None
            return "crash", f"the process ended with {status}", None
        answer = json.loads(line)
        return answer["code"], answer["found"], answer["mb"]

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None:
            command = [sys.executable, __file__, "--child", str(self._scratch)]
            self._process = subprocess.Popen(
                command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert self._process.stdout is not None
            self._process.stdout.readline()  # it has imported what it needs: from here on, seconds are the mutant's
        return self._process


def held_mb() -> float:
    """Memory that this process needs: without what Python and the allocator would give back when asked."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def serve_parent(scratch: Path) -> None:
    """The child: read each path of standard input, answer in one line of JSON."""
    from app.api.problems import status_of  # noqa: PLC0415 - the parent needs none of the service
    from app.errors import CounterpartError  # noqa: PLC0415
    from app.ingest import dicom, read  # noqa: PLC0415

    assert dicom  # its imports take longer than a mutant
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        found = ""
        try:
            read(Path(line.rstrip("\n")), scratch=scratch, geometry="resample")
            code = "read"
        except CounterpartError as error:
            code = error.code
            if status_of(type(error)) >= 500:
                found = f"{code} is answered with {status_of(type(error))}"
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            code, found = "exception", f"{type(error).__name__}: {error}"
        shutil.rmtree(scratch, ignore_errors=True)
        mb = None if number % TOLD_EVERY else held_mb()
        print(json.dumps({"code": code, "found": found, "mb": mb}), flush=True)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve_parent(options.child)
        return
    data = Path(os.environ.get("COUNTERPART_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        outcome = fuzz(seeds(data, Path(scratch)), options.count, options.seed, options.keep)
    for code, count in outcome.codes.most_common():
        print(f"{count:6d} {code}")
    seconds = time.perf_counter() - start
    print(
        f"{options.count} mutants of seed {options.seed} in {seconds:.0f} s; memory grew by {outcome.grown_mb:.0f} MB"
    )
    for finding in outcome.findings:
        print(f"FOUND {finding}")
    sys.exit(bool(outcome.findings))


if __name__ == "__main__":
    main()
