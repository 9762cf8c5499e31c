"""Engine in a child process, so that a crash or a lack of memory ends one scan and not its worker.

The worker owns the queue and the store. The child process reads, infers and exports. If the child process crashes
or is killed, the worker records which scan it analysed. If memory ran out, the child process is ended to release
its memory. The computation does not block the threads of the worker, which may also serve the API. See decision 12.

`SubprocessEngine` is the side of the worker. `TaskServer` is the side of the child process, which runs this module. It
ends when the worker ends. Both sides exchange JSON messages over a pair of sockets::

    worker -> child   {"warm_up": true}, {"scan", "out", "request"} for an inference,
                      the same with "inferred" for an export, {"stop": true}
    child -> worker   {"progress": [stage, fraction]}, {"ready": true}, {"inferred": true}, {"report"},
                      {"problem"}, {"error_location"}
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from app.analysis import AnalysisRequest, Progress
from app.errors import (
    Cancelled,
    CounterpartError,
    NotReady,
    OutOfMemory,
    TookTooLong,
    UnexpectedError,
    error_location,
    from_problem,
    scan_out_of_memory,
)
from app.export.report import Report
from app.jobs.engine import ChildProcessDied, Engine
from app.jobs.faults import SERVICE_ERRORS, find_service_fault
from app.manifest import Manifest
from app.runtime.session import Provider
from app.site_profile import SiteProfile

# Seconds between two calls of the progress callback, which checks for cancellation, while the child sends nothing.
POLL_SECONDS = 0.1
# A stopped child process ends the scan after the current network evaluation, or is killed after this time.
STOP_SECONDS = 0.3
EXIT_SECONDS = 5.0
# A child process that somebody has suspended (SIGSTOP) is replaced after this time.
SUSPENDED_SECONDS = 10.0
# States in /proc of a process that a signal or a debugger has suspended.
SUSPENDED_STATES = "Tt"
DEADLINE_SECONDS = 1800.0
# The longest time that one wait counts for a deadline. A wait takes longer if the whole machine or container was
# suspended, which is not a fault of the scan.
MAX_COUNTED_SECONDS = 1.0

# The scheduler prefers the API, so that a request for the state of a scan does not wait for the scan.
NICENESS = 5
# The fraction of the free memory that a scan may use. The rest is for the worker and other processes.
MEMORY_SHARE = 0.8
KIB = 1024


# ---- worker ------------------------------------------------------------------------------------


class SubprocessEngine:
    """An engine that runs another engine in a child process, and replaces the child process if it has died.

    Parameters
    ----------
    local : Engine
        Engine in this process for everything except inference. It loads no models.
    factory : str
        Callable that makes the engine of the child process, as "module:name".
    arguments : dict
        Keyword arguments of the factory, which JSON can represent.
    deadline_seconds : float
        Longest time of one task: to load the models, to read a scan and infer, or to export.
    """

    def __init__(
        self, local: Engine, factory: str, arguments: dict[str, Any], deadline_seconds: float = DEADLINE_SECONDS
    ) -> None:
        self._local = local
        self._command = (factory, json.dumps(arguments))
        self._child: ChildProcess | None = None
        self._deadline_seconds = deadline_seconds
        # Serialises scans and model loading.
        self._lock = Lock()

    @property
    def provider(self) -> Provider:
        """Return the execution provider of the networks, "cpu" or "cuda"."""
        return self._local.provider

    @property
    def manifests(self) -> Sequence[Manifest]:
        """Return the manifests of the installed models."""
        return self._local.manifests

    def card(self, model: str) -> str | None:
        """Return the model card of a model id in Markdown, or None if the model has no card."""
        return self._local.card(model)

    def profiles(self, model: str) -> Sequence[SiteProfile]:
        """Return the site profiles of a model id, for all its scanners."""
        return self._local.profiles(model)

    @property
    def settings_key(self) -> str:
        """Return a text of the settings, besides the models, that change results. It is empty for their defaults."""
        return self._local.settings_key

    def child_pid(self) -> int | None:
        """Return the process id of the child process, or None if none runs."""
        child = self._child
        return child.pid if child is not None and child.is_running() else None

    def warm_up(self) -> None:
        """Load every model in the child process and run a real inference with it.

        Raises
        ------
        NotReady
            The child process ended, or was killed at its deadline.
        CounterpartError
            A model cannot be used.
        """
        with self._lock:
            try:
                self._wait_for_answer(self._running_child(), {"warm_up": True}, "load", lambda *_: None)
            except (ChildProcessDied, TookTooLong) as ended:
                reason = ended.title if isinstance(ended, TookTooLong) else str(ended)
                raise NotReady(
                    f"The inference process ended while it loaded the models ({reason}).",
                    expected="models that load.",
                    advice="Run `counterpart doctor`. The machine may be short of memory.",
                ) from None
            except CounterpartError:
                self._end_child()  # the next one reads the bundles again
                raise

    def infer(self, scan: Path, out: Path, request: AnalysisRequest, progress: Progress) -> None:
        """Run the inference of a scan in the child process. See `Engine.infer`.

        Raises
        ------
        ChildProcessDied
            The child process ended during the scan, or was suspended and therefore killed.
        TookTooLong
            The scan reached its deadline. The child process was killed.
        UnexpectedError
            The child process raised an exception other than `CounterpartError`.
        """
        self._run({"scan": str(scan), "out": str(out), "request": asdict(request)}, "read", progress)

    def export(self, scan: Path, inferred: Path, out: Path, request: AnalysisRequest, progress: Progress) -> Report:
        """Write the results in the child process. See `Engine.export`.

        Raises
        ------
        ChildProcessDied, TookTooLong, UnexpectedError
            See `infer`.
        """
        task = {"scan": str(scan), "inferred": str(inferred), "out": str(out), "request": asdict(request)}
        return Report.model_validate(self._run(task, "export", progress)["report"])

    def close(self) -> None:
        """End the child process."""
        self._end_child()

    def _run(self, task: dict[str, Any], stage: str, progress: Progress) -> dict[str, Any]:
        """Return the child's answer to a task. Report `stage` until the child sends its first progress."""
        while not self._lock.acquire(timeout=POLL_SECONDS):
            progress(stage, 0.0)
        try:
            return self._wait_for_answer(self._running_child(), task, stage, progress)
        except (OutOfMemory, *SERVICE_ERRORS):
            # onnxruntime and Python do not return freed memory to the system. After a fault of the service, the next
            # child reads the bundles again and has no open files.
            self._end_child()
            raise
        finally:
            self._lock.release()

    def _wait_for_answer(
        self, child: "ChildProcess", task: dict[str, Any], stage: str, progress: Progress
    ) -> dict[str, Any]:
        child.send(task)
        fraction, used, suspended, last = 0.0, 0.0, 0.0, time.monotonic()
        while True:
            message = child.receive(POLL_SECONDS)
            now = time.monotonic()
            waited, last = min(now - last, MAX_COUNTED_SECONDS), now
            used, suspended = used + waited, suspended + waited if child.is_suspended() else 0.0
            if message.keys() & {"report", "inferred", "ready"}:
                return message
            if message and "progress" not in message:
                _raise_error(message)
            if used > self._deadline_seconds:
                self._end_child()
                raise _took_too_long(self._deadline_seconds, stage)
            if suspended > SUSPENDED_SECONDS:
                self._end_child()
                raise ChildProcessDied(-signal.SIGSTOP)
            stage, fraction = message.get("progress", (stage, fraction))
            try:
                progress(stage, fraction)
            except BaseException:
                if not child.stop_task():
                    self._end_child()
                raise

    def _running_child(self) -> "ChildProcess":
        if self._child is None or not self._child.is_running():
            self._end_child()
            self._child = ChildProcess(self._command)
        return self._child

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


class ChildProcess:
    """The parent's side of a child process.

    Parameters
    ----------
    command : sequence of str
        Arguments of `main`, without the socket.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._connection, childs_end = Pipe()
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        arguments = [sys.executable, "-P", "-m", "app.jobs.subprocess_engine", str(childs_end.fileno()), *command]
        # The child process has no log, because libraries can print patient data.
        null = subprocess.DEVNULL
        self._process = subprocess.Popen(  # noqa: S603  # this interpreter with fixed arguments
            arguments, env=environ, pass_fds=[childs_end.fileno()], stdin=null, stdout=null, stderr=null
        )
        childs_end.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def is_running(self) -> bool:
        """Return whether the process has not ended."""
        return self._process.poll() is None

    def is_suspended(self) -> bool:
        """Return whether a signal has suspended the process, so that it neither works nor ends."""
        try:
            # The state follows the name of the program, which is in parentheses.
            stat = Path(f"/proc/{self._process.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] in SUSPENDED_STATES
        except (OSError, IndexError):  # the process has ended, or this system has no /proc
            return False

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. If the process has ended, `receive` raises the error."""
        with suppress(OSError):
            self._connection.send_bytes(json.dumps(message).encode())

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the next message, or an empty one if none comes within a time.

        Raises
        ------
        ChildProcessDied
        """
        try:
            if not self._connection.poll(seconds):
                return {}
            message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise ChildProcessDied(self._exit_status()) from None
        return message

    def stop_task(self) -> bool:
        """Ask the process to stop its task, and return whether it did so in time."""
        self.send({"stop": True})
        try:
            while message := self.receive(STOP_SECONDS):
                if "progress" not in message:
                    return True
        except ChildProcessDied:
            pass
        return False

    def kill(self) -> None:
        """Kill the process. It holds no data that anyone needs."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # it waits for a device, and ends when the device answers
            self._process.wait(EXIT_SECONDS)
        self._connection.close()

    def _exit_status(self) -> int:
        """Return the exit status of the process, whose end of the connection is closed."""
        try:
            return self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _took_too_long(seconds: float, stage: str) -> TookTooLong:
    return TookTooLong(
        f"The analysis was stopped after {seconds:g} seconds, in the stage {stage}.",
        expected="a scan that is analysed within COUNTERPART_DEADLINE_SECONDS.",
        advice="Send one series of usual size. The operator can raise the deadline, or use a faster machine.",
    )


def _raise_error(message: dict[str, Any]) -> None:
    if "problem" in message:
        raise from_problem(message["problem"])
    raise UnexpectedError(message["error_location"])


# ---- child process -----------------------------------------------------------------------------


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
