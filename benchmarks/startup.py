"""How long a person waits: for --help, and for the first network evaluation of `counterpart detect`."""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

# A new process: when it was started is handed over, on a clock that all processes share.
PROBE = """
import sys, time
from app.slim import import_nibabel
import_nibabel()  # as the command does
from app.runtime import session
made = session.as_callable

def noted(opened, **options):
    run = made(opened, **options)
    def call(*arrays):
        print("evaluated", time.monotonic(), flush=True)
        return run(*arrays)
    return call

session.as_callable = noted
import app.analysis
extract = app.analysis._take_out

def told(*arguments):
    print("scan", flush=True)
    return extract(*arguments)

app.analysis._take_out = told
sys.argv = ["counterpart", "detect", *sys.argv[1:]]
from app.cli import main
main()
"""


def help_seconds() -> float:
    """From the start of a process to the end of its help."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "app.cli", "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def first_evaluations(scan: Path, bundles: Path) -> dict[str, float]:
    """Seconds from the start of the process to its first network evaluation: on the golden pair, and on the scan."""
    with TemporaryDirectory() as out:
        start = time.monotonic()
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", PROBE, str(scan), "-o", out, "--json"],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "COUNTERPART_MODELS": str(bundles)},
        )
    return read_probe(done.stdout, start)


def read_probe(text: str, start: float) -> dict[str, float]:
    """The first evaluation at all, and the first one after the scan was read."""
    first: dict[str, float] = {}
    key = "golden"
    for line in text.splitlines():
        if line == "scan":
            key = "scan"
        elif line.startswith("evaluated ") and key not in first:
            first[key] = float(line.split()[1]) - start
    return first
