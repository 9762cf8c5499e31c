"""The service in a process of its own, on a free port of loopback; by default with `FakeEngine`."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from app.main import serve
from app.settings import read_settings
from tests.api.support import FakeEngine

CHECKOUT = Path(__file__).resolve().parents[2]
FAKE = (sys.executable, "-m", "tests.api.served")


@dataclass(frozen=True)
class Served:
    """A running service."""

    process: subprocess.Popen[bytes]
    port: int
    http: httpx2.Client


@contextmanager
def served(store: Path, log: Path, command: Sequence[str] = FAKE, **settings: str) -> Iterator[Served]:
    """Start the service, wait until it is ready, and see to it that it ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = os.environ | {"COUNTERPART_STORE": str(store), "COUNTERPART_PORT": str(port)}
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
    serve(read_settings(), FakeEngine())
