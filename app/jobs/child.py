"""Child process of `app.jobs.subprocess_engine`: it runs one engine and exits when its parent exits."""

import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from app.analysis import AnalysisRequest
from app.errors import Cancelled, CounterpartError, error_location, scan_out_of_memory
from app.jobs.engine import Engine
from app.jobs.faults import find_service_fault

# The scheduler prefers the API, so that a request for the state of a scan does not wait for the scan.
NICENESS = 5
# The fraction of the free memory that a scan may use. The rest is for the worker and other processes.
MEMORY_SHARE = 0.8
KIB = 1024


class TaskServer:
    """Runs the tasks that arrive over a connection on one engine, one after the other.

    Parameters
    ----------
    connection : Connection
    engine : Engine
    """

    def __init__(self, connection: Connection, engine: Engine) -> None:
        self._connection = connection
        self._engine = engine
        self._tasks: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._stop = Event()

    def run(self) -> None:
        """Run tasks until the parent exits."""
        Thread(target=self._receive, daemon=True).start()
        while True:
            self._send(self._run_task(self._tasks.get()))

    def _receive(self) -> None:
        """Receive messages while the engine works. Exit when the parent has exited in any way."""
        while True:
            try:
                message = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)
            if "stop" in message:
                self._stop.set()
            else:
                self._stop.clear()
                self._tasks.put(message)

    def _run_task(self, task: dict[str, Any]) -> dict[str, Any]:
        try:
            if "warm_up" in task:
                self._engine.warm_up()
                return {"ready": True}
            if self._engine.provider == "cpu":  # CUDA reserves address space that says nothing about used memory
                limit_memory()
            scan, out, request = Path(task["scan"]), Path(task["out"]), AnalysisRequest(**task["request"])
            if "inferred" not in task:
                self._engine.infer(scan, out, request, self._progress)
                return {"inferred": True}
            report = self._engine.export(scan, Path(task["inferred"]), out, request, self._progress)
            return {"report": report.model_dump(mode="json")}
        except Exception as error:  # noqa: BLE001  # sent without its text, which can hold patient data
            if (fault := find_service_fault(error)) is not None:
                return {"problem": fault.problem}
            if isinstance(error, MemoryError):
                error = scan_out_of_memory()
            if isinstance(error, CounterpartError):
                return {"problem": error.problem}
            return {"error_location": error_location(error)}

    def _progress(self, stage: str, fraction: float) -> None:
        if self._stop.is_set():
            raise Cancelled("The job was stopped.", expected="a job that runs to its end.", advice="Send it again.")
        self._send({"progress": [stage, fraction]})

    def _send(self, message: dict[str, Any]) -> None:
        self._connection.send_bytes(json.dumps(message).encode())


def limit_memory() -> None:
    """Limit this process to its current memory and most of the memory that is free now.

    An allocation then fails before the system kills a process. Each scan has a limit of its own. Without /proc, which
    only Linux has, there is no limit.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = _read_number(status, "VmData:") * KIB
    limit = used + int(MEMORY_SHARE * free_memory())
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def free_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the free memory in bytes of this machine or container. Memory of cached files counts as free."""
    free = _read_number(proc / "meminfo", "MemAvailable:") * KIB
    try:
        limit = int((cgroup / "memory.max").read_text())
        files = sum(_read_number(cgroup / "memory.stat", name) for name in ("active_file", "inactive_file"))
        return max(0, min(free, limit - int((cgroup / "memory.current").read_text()) + files))
    except (OSError, ValueError):  # no container, or the limit "max"
        return free


def _read_number(path: Path, name: str) -> int:
    """Return the number after a name in a table of the system, or 0."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == name), 0)


def main(descriptor: str, factory: str, arguments: str) -> None:
    """Run the child process.

    Parameters
    ----------
    descriptor : str
        File descriptor of the socket to the parent.
    factory : str
        Callable that makes the engine, as "module:name".
    arguments : str
        Keyword arguments of the factory, as JSON.
    """
    # Process supervisors and terminals signal all processes at once. Only the parent decides when the scan ends.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    TaskServer(Connection(int(descriptor)), resolve_name(factory)(**json.loads(arguments))).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
