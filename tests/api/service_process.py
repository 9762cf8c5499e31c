"""The service as a child process on a free port of loopback, with `FakeEngine` by default."""

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
from app.main import run_worker, serve
from app.settings import read_settings
from tests.api.support import TIMEOUT_SECONDS, FakeEngine
from tests.support.servers import free_port

CHECKOUT = Path(__file__).resolve().parents[2]
# Commands.
SERVICE = (sys.executable, "-m", "tests.api.service_process")
API_ONLY = (*SERVICE, "--no-worker")
WORKER_ONLY = (*SERVICE, "--no-api")
# The engine runs in a child process, like the real one.
WITH_SUBPROCESS = (*SERVICE, "--subprocess")


@dataclass(frozen=True)
class RunningService:
    """A running service."""

    process: subprocess.Popen[bytes]
    port: int
    http: httpx2.Client


@contextmanager
def run_service(
    folder: Path, log: Path, command: Sequence[str] = SERVICE, environ: Mapping[str, str] | None = None, **settings: str
) -> Iterator[RunningService]:
    """Start the service, wait until it is ready, and kill it at the end.

    Parameters
    ----------
    folder : Path
        Scratch folder, and the store unless `settings` names another one.
    log : Path
        File for the output of the process.
    command : sequence of str
    environ : mapping, optional
        Additional environment variables.
    **settings : str
        Settings by lower-case name without prefix. By default, `port` is a free one.
    """
    port = int(settings.pop("port", free_port()))
    local = {"STORE": str(folder), "SCRATCH": str(folder), "PORT": str(port)}
    environ = os.environ | dict(environ or {}) | {f"COUNTERPART_{name}": value for name, value in local.items()}
    environ |= {f"COUNTERPART_{name.upper()}": value for name, value in settings.items()}
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=CHECKOUT, env=environ, stdout=output, stderr=output)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=90) as http:
            _wait_until_ready(http, process, log)
            yield RunningService(process, port, http)
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(http: httpx2.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if http.get("/readyz").status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not ready:\n{log.read_text()}")


if __name__ == "__main__":
    engine: Engine = FakeEngine()
    if "--subprocess" in sys.argv:
        engine = SubprocessEngine(engine, "tests.api.support:FakeEngine", {})
    if "--no-api" in sys.argv:
        run_worker(read_settings(), engine)
    else:
        serve(read_settings(), engine, worker="--no-worker" not in sys.argv)
