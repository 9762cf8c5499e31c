"""Failed starts: one clear sentence on standard error within seconds, and status 1."""

import os
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.api import protocol, server
from tests.api.service_process import CHECKOUT, run_service

COMMANDS = ("serve", "worker")
# The start itself must take less than five seconds. Python's imports take some on a busy machine.
SECONDS = 5 + 25


def start(command: str, store: Path, models: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    port = settings.pop("port", "0")
    environ = os.environ | {"COUNTERPART_STORE": str(store), "COUNTERPART_MODELS": str(models)}
    environ |= {f"COUNTERPART_{name.upper()}": value for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-m", "app.cli", command, "--port", port],
        cwd=CHECKOUT, env=environ, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def check_sentence(done: subprocess.CompletedProcess[str], code: str) -> None:
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert (done.returncode, len(lines)) == (1, 1), done.stderr
    assert lines[0].startswith(f"{code}: ")
    assert "geheim" not in done.stderr + done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_port_in_use(tmp_path: Path, tiny_models: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = start(command, tmp_path / "store", tiny_models, port=port)
    check_sentence(done, "address_unavailable")
    assert port in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_store_that_cannot_be_written(tmp_path: Path, tiny_models: Path, command: str) -> None:
    (tmp_path / "file").touch()
    check_sentence(start(command, tmp_path / "file" / "store", tiny_models), "store_unavailable")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("answers", [False, True])
def test_database_that_does_not_answer(
    tmp_path: Path,
    tiny_models: Path,
    command: str,
    answers: bool,  # noqa: FBT001
) -> None:
    """Nothing listens on the port, or a program that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if not answers:
            silent.close()
        database = f"postgresql://user:geheim@127.0.0.1:{port}/db"
        check_sentence(start(command, tmp_path, tiny_models, database=database), "database_unavailable")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("content", [b"no database" * 1000, None])
def test_damaged_sqlite_file(tmp_path: Path, tiny_models: Path, command: str, content: bytes | None) -> None:
    path = tmp_path / "jobs.sqlite"
    if content is None:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE t (x)")
            database.executemany("INSERT INTO t VALUES (?)", [("x" * 500,)] * 500)
        damaged = bytearray(path.read_bytes())
        damaged[8192:40960] = bytes(b ^ 0x5A for b in damaged[8192:40960])
        content = bytes(damaged)
    path.write_bytes(content)
    check_sentence(start(command, tmp_path, tiny_models), "database_unavailable")
    assert path.read_bytes() == content


def test_store_is_private_and_an_open_one_is_named_in_the_log(tmp_path: Path) -> None:
    store, log = tmp_path / "parent" / "store", tmp_path / "log"
    before = os.umask(0)
    try:
        with run_service(store, log):
            modes = {path: path.stat().st_mode & 0o077 for path in (store.parent, store, *store.rglob("*"))}
        assert not any(modes.values()), modes
        assert "open to other users" not in log.read_text()
        store.chmod(0o755)
        with run_service(store, log):
            pass
        assert "open to other users" in log.read_text()
    finally:
        os.umask(before)


def test_slow_head_of_a_request_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert protocol.HEADER_SECONDS < 60
    starter = tmp_path / "short.py"
    starter.write_text(
        "import runpy, sys\nfrom app.api import protocol\nprotocol.HEADER_SECONDS = 1.0\n"
        "sys.argv = ['service']\nrunpy.run_module('tests.api.service_process', run_name='__main__')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    with run_service(tmp_path / "store", tmp_path / "log", (sys.executable, str(starter))) as service:
        for head, status in ((b"", b""), (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", b"HTTP/1.1 408 ")):
            with socket.create_connection(("127.0.0.1", service.port), 30) as connection:
                connection.sendall(head)
                start_time = time.monotonic()
                assert connection.recv(13) == status
                assert time.monotonic() - start_time < 20
        for _ in range(2):
            assert service.http.get("/livez").status_code == 200
            time.sleep(1.5)


def test_listener_sends_small_answers_at_once() -> None:
    """asyncio leaves Nagle's algorithm on for a socket without a protocol: each call then takes 40 ms longer."""
    with server.open_listener("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
