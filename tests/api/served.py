"""The service in a process of its own, on a free port of loopback; by default with `FakeEngine`."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from app.jobs.engine import Engine
from app.jobs.subprocess_engine import SubprocessEngine
from app.main import serve, work
from app.settings import read_settings
from tests.api.support import FakeEngine
from tests.support.servers import free_port

CHECKOUT = Path(__file__).resolve().parents[2]
FAKE = (sys.executable, "-m", "tests.api.served")
API = (*FAKE, "--no-worker")
WORKER = (*FAKE, "--no-api")
# With the engine in a process of its own, as the real one is.
APART = (*FAKE, "--apart")


@dataclass(frozen=True)
class Served:
    """A running service."""

    process: subprocess.Popen[bytes]
    port: int
    http: httpx2.Client


@contextmanager
def served(
    folder: Path, log: Path, command: Sequence[str] = FAKE, environ: Mapping[str, str] | None = None, **settings: str
) -> Iterator[Served]:
    """Start the service, wait until it is ready, and see to it that it ends.

    Parameters
    ----------
    folder : Path
        Its store, unless `settings` names another; its scratch in any case.
    log : Path
        Takes its output.
    command : sequence of str
        What to start.
    environ : mapping, optional
        For its environment.
    **settings : str
        COUNTERPART_... in lower case.
    """
    port = free_port()
    local = {"STORE": str(folder), "SCRATCH": str(folder), "PORT": str(port)}
    environ = os.environ | dict(environ or {}) | {f"COUNTERPART_{name}": value for name, value in local.items()}
    environ |= {f"COUNTERPART_{name.upper()}": value for name, value in settings.items()}
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=CHECKOUT, env=environ, stdout=output, stderr=output)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=90) as http:
            _wait_until_ready(http, process, log)
            yield Served(process, port, http)
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(http: httpx2.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if http.get("/readyz").status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"never ready:\n{log.read_text()}")


if __name__ == "__main__":
    engine: Engine = FakeEngine()
    if "--apart" in sys.argv:
        engine = SubprocessEngine(engine, "tests.api.support:FakeEngine", {})
    if "--no-api" in sys.argv:
        work(read_settings(), engine)
    else:
        serve(read_settings(), engine, worker="--no-worker" not in sys.argv)
