"""PostgreSQL and S3 servers on loopback for tests and proofs. Each server stops at the end of its block."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 60
BUCKET = "scans"


def free_port() -> int:
    """Return a port that no process listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def find_postgres() -> Path | None:
    """Return the folder of the newest PostgreSQL server of a Debian package, or None if there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextmanager
def postgres() -> Iterator[str]:
    """Start PostgreSQL with an empty database and yield its URL.

    The server refuses to run as root. It then runs as the user that the Debian package created.
    """
    programs = find_postgres()
    if programs is None:
        raise FileNotFoundError("no PostgreSQL server: apt-get install postgresql")
    user = "postgres" if os.geteuid() == 0 else None
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="counterpart-postgres-") as folder:
        if user:
            shutil.chown(folder, user)

        def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
            command = [str(programs / program), *arguments]
            return subprocess.Popen(command, cwd="/", user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def run(program: str, *arguments: str) -> int:
            return start(program, *arguments).wait(START_SECONDS)

        data, address = f"{folder}/data", ("-h", "127.0.0.1", "-p", str(port))
        if run("initdb", "-D", data, "-U", "counterpart", "-A", "trust", "--no-sync"):
            raise RuntimeError("initdb failed")
        process = start("postgres", "-D", data, "-k", folder, *address)
        try:
            _wait_for(port, process)
            while run("pg_isready", *address):
                time.sleep(0.1)
            if run("createdb", *address, "-U", "counterpart", "counterpart"):
                raise RuntimeError("createdb failed")
            yield f"postgresql://counterpart@127.0.0.1:{port}/counterpart"
        finally:
            process.send_signal(signal.SIGINT)  # a fast shutdown
            process.wait(START_SECONDS)


@contextmanager
def s3() -> Iterator[dict[str, str]]:
    """Start an S3-compatible server (moto, in memory) with one bucket, and yield its environment variables."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    environ = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    try:
        _wait_for(port, process)
        _make_bucket(port)
        yield environ
    finally:
        process.terminate()
        process.wait(30)


def _make_bucket(port: int) -> None:
    """Create the bucket with one HTTP request. This server does not check signatures."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        request = f"PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        status = connection.recv(15)
    if b" 200" not in status:
        raise RuntimeError(f"no bucket: {status!r}")


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"{process.args!r} did not start")
