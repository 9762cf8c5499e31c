"""What the proofs measure with, where it can be wrong without being seen."""

import subprocess
import sys

from scripts.prove_soak import look

# A parent whose child works for a second, ends and is reaped; then the parent waits.
WORK = "import time\nwhile time.process_time() < 1.0: pass"
PARENT = (
    f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORK!r}]); print(flush=True); sys.stdin.read()"
)


def test_the_work_of_children_that_ended_counts() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        assert look(parent.pid).cores >= 1.0
        parent.communicate()
