"""Count of the files and hops that one scan passes on its way through the service.

Run: ``python -m tests.proofs.call_path SCAN [QUERY]``, for example ``... series.zip geometry=resample``.

Rule of counting. The service runs as `counterpart serve`, with the shipped bundles and the inference in its
child process. Every call of a function of `app` is recorded between the first byte of the POST and the finished
job. A **file** counts if one of its functions is called for the scan. A **hop** is the first call into a file, or a
hand-over between two processes or threads (request to queue, queue to worker, worker to child). Not counted: code
that runs at import, background threads (heartbeats), and modules that hold only values (`errors`, `manifest`,
`settings`, `volume`).
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
VALUE_MODULES = {"errors.py", "manifest.py", "settings.py", "volume.py"}
# Threads that do not work on the scan.
BACKGROUND_THREADS = {"supervisor", "warm-up", "deliveries", "webhooks", "audit-retention"}
HAND_OVERS = 3
START_SECONDS = 180
READY_POLL_SECONDS = 0.3

# Python imports `sitecustomize` at start, in the service and in its child process.
RECORDER = """
import json, os, sys, threading, time
root, flag, out = os.environ["CALL_PATH_ROOT"] + "/", os.environ["CALL_PATH_FLAG"], os.environ["CALL_PATH_OUT"]
calls = {}
def profile(frame, event, _):
    if event != "call" or not frame.f_code.co_filename.startswith(root) or not os.path.exists(flag):
        return
    caller = frame
    while caller is not None:  # a function that runs while a module is imported works on no scan
        is_module = caller.f_code.co_name == "<module>" and caller.f_code.co_filename.startswith(root)
        if is_module and caller.f_back is not None and "importlib" in caller.f_back.f_code.co_filename:
            return
        caller = caller.f_back
    key = threading.current_thread().name, frame.f_code.co_filename[len(root):], frame.f_code.co_qualname
    calls.setdefault(key, time.time())
def dump():
    while True:
        time.sleep(0.2)
        with open(f"{out}/{os.getpid()}.json", "w") as file:
            json.dump([[at, *key] for key, at in list(calls.items())], file)
threading.setprofile(profile)
sys.setprofile(profile)
threading.Thread(target=dump, daemon=True, name="call-path").start()
"""


def record(scan: Path, query: str, root: Path = ROOT) -> list[tuple[float, str, str]]:
    """Send a scan to a separate service and return the calls as (time, file, function)."""
    with TemporaryDirectory() as scratch, socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        folder = Path(scratch)
        (folder / "out").mkdir()
        (folder / "sitecustomize.py").write_text(RECORDER)
        environ = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder), str(root)]),
            "CALL_PATH_ROOT": str(root / "app"),
            "CALL_PATH_FLAG": str(folder / "on"),
            "CALL_PATH_OUT": str(folder / "out"),
            "COUNTERPART_STORE": str(folder / "store"),
        }
        free.close()
        command = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", str(port)]
        with (folder / "log").open("wb") as log:
            service = subprocess.Popen(command, cwd=root, env=environ, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url)
            (folder / "on").touch()
            request = urllib.request.Request(
                f"{url}/v1/scans?{query}", scan.read_bytes(), {"Prefer": "wait=280"}, method="POST"
            )
            with urllib.request.urlopen(request) as answer:
                assert json.load(answer)["state"] == "succeeded"
            (folder / "on").unlink()
            time.sleep(1)  # the last dump
        finally:
            service.terminate()
            service.wait()
        calls = [call for path in (folder / "out").iterdir() for call in json.loads(path.read_text())]
    return sorted((at, file, name) for at, thread, file, name in calls if thread not in BACKGROUND_THREADS)


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz"):
                return
        except OSError:
            time.sleep(READY_POLL_SECONDS)
    raise SystemExit("The service did not become ready.")


def main(scan: str, query: str = "", root: str = str(ROOT)) -> None:
    """Print the files in the order of their first call, and the counts."""
    first: dict[str, str] = {}
    for _, file, name in record(Path(scan), query, Path(root)):
        if Path(file).name not in VALUE_MODULES:
            first.setdefault(file, name)
    for number, (file, name) in enumerate(first.items(), start=1):
        sys.stdout.write(f"{number:3d}  app/{file}: {name}\n")
    sys.stdout.write(f"{len(first)} files, {len(first) + HAND_OVERS} hops\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
