"""The servers that the proofs and the tests need, on loopback, each a process that ends with its block."""

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

import obstore
from obstore.store import S3Store

START_SECONDS = 60
BUCKET = "scans"


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def find_postgres() -> Path | None:
    """Folder of the newest PostgreSQL server's programs, as Debian's package puts them; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@contextmanager
def postgres() -> Iterator[str]:
    """A fresh PostgreSQL with an empty database; yields its URL.

    The server refuses to run as root: then it runs as the user that Debian's package made.
    """
    programs = find_postgres()
    if programs is None:
        raise FileNotFoundError("no PostgreSQL server: apt-get install postgresql")
    user = "postgres" if os.geteuid() == 0 else None
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="counterpart-postgres-") as folder:
        if user:
            shutil.chown(folder, user)

        def start(program: str, *words: str) -> subprocess.Popen[bytes]:
            command = [str(programs / program), *words]
            return subprocess.Popen(command, cwd="/", user=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def run(program: str, *words: str) -> int:
            return start(program, *words).wait(START_SECONDS)

        data, where = f"{folder}/data", ("-h", "127.0.0.1", "-p", str(port))
        if run("initdb", "-D", data, "-U", "counterpart", "-A", "trust", "--no-sync"):
            raise RuntimeError("initdb failed")
        process = start("postgres", "-D", data, "-k", folder, *where)
        try:
            _wait_for(port, process)
            while run("pg_isready", *where):
                time.sleep(0.1)
            if run("createdb", *where, "-U", "counterpart", "counterpart"):
                raise RuntimeError("createdb failed")
            yield f"postgresql://counterpart@127.0.0.1:{port}/counterpart"
        finally:
            process.send_signal(signal.SIGINT)  # a fast shutdown
            process.wait(START_SECONDS)


@contextmanager
def s3() -> Iterator[dict[str, str]]:
    """An S3-compatible server (moto's, in memory) with one bucket; yields the environment that finds it."""
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


def list_bucket(environ: dict[str, str], prefix: str) -> list[str]:
    """Names of the objects in the bucket."""
    store = S3Store(
        BUCKET,
        endpoint=environ["AWS_ENDPOINT_URL"],
        region=environ["AWS_REGION"],
        access_key_id=environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
        client_options={"allow_http": True},
    )
    return [entry["path"] for page in obstore.list(store, prefix) for entry in page]


def _make_bucket(port: int) -> None:
    """One request of the protocol; this server does not look at signatures."""
    with socket.create_connection(("127.0.0.1", port), 30) as wire:
        request = f"PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        wire.sendall(request.encode())
        status = wire.recv(15)
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
