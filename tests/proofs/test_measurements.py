"""Measurements of the proofs that could be wrong without a failure."""

import subprocess
import sys

from tests.proofs.soak import measure_usage

# The parent has a child that computes for a second and ends. Then the parent waits.
CHILD = "import time\nwhile time.process_time() < 1.0: pass"
PARENT = (
    f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}]); print(flush=True); sys.stdin.read()"
)


def test_usage_includes_ended_children() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        assert measure_usage(parent.pid).core_seconds >= 1.0
        parent.communicate()
