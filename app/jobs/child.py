"""The process that infers, started by `app.jobs.apart`: it does what it is asked, and ends with its parent."""

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
from app.errors import Cancelled, CounterpartError
from app.jobs.engine import Engine
from app.jobs.runner import out_of_memory, where

# Whoever asks for the state of a scan is answered before the scan goes on.
NICENESS = 5
# Of the free memory, what a scan may take that a worker died with: the rest is the worker's and everyone else's.
SHARE = 0.8
KIB = 1024


class Inference:
    """One engine, asked over a wire.

    Parameters
    ----------
    wire : Connection
    engine : Engine
    """

    def __init__(self, wire: Connection, engine: Engine) -> None:
        self._wire = wire
        self._engine = engine
        self._asked: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._stop = Event()

    def run(self) -> None:
        """Do what is asked, one thing after the other."""
        Thread(target=self._listen, daemon=True).start()
        while True:
            self._say(self._answer(self._asked.get()))

    def _listen(self) -> None:
        """Take requests while the engine works; the parent's end is the child's, however it came."""
        while True:
            try:
                message = json.loads(self._wire.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)
            if "stop" in message:
                self._stop.set()
            else:
                self._stop.clear()
                self._asked.put(message)

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            if "warm" in asked:
                self._engine.warm_up()
                return {"ready": True}
            guard(on=asked["guard"])
            scan, out, request = Path(asked["scan"]), Path(asked["out"]), AnalysisRequest(**asked["request"])
            if "inferred" not in asked:
                self._engine.infer(scan, out, request, self._progress)
                return {"inferred": True}
            report = self._engine.export(scan, Path(asked["inferred"]), out, request, self._progress)
            return {"report": report.model_dump(mode="json")}
        except CounterpartError as error:
            return {"problem": error.problem}
        except MemoryError:
            return {"problem": out_of_memory().problem}
        except Exception as error:  # noqa: BLE001  # told without its text, which may hold patient data
            return {"fault": where(error)}

    def _progress(self, stage: str, fraction: float) -> None:
        if self._stop.is_set():
            raise Cancelled("The job was stopped.", expected="a job that is wanted.", advice="Send it again.")
        self._say({"progress": [stage, fraction]})

    def _say(self, message: dict[str, Any]) -> None:
        self._wire.send_bytes(json.dumps(message).encode())


def guard(*, on: bool) -> None:
    """Limit this process to what it holds and most of what is free: allocations fail before anything is killed."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = _number(Path("/proc/self/status"), "VmData:") * KIB
    limit = held + int(SHARE * free_memory()) if on else hard
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def free_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this machine, and the container that it may be, have left; what files occupy is not lost."""
    free = _number(proc / "meminfo", "MemAvailable:") * KIB
    try:
        most = int((cgroup / "memory.max").read_text())
        files = sum(_number(cgroup / "memory.stat", name) for name in ("active_file", "inactive_file"))
        return max(0, min(free, most - int((cgroup / "memory.current").read_text()) + files))
    except (OSError, ValueError):  # no container, or one without a limit, which is "max"
        return free


def _number(path: Path, name: str) -> int:
    """The number behind a name, in one of the system's tables."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == name), 0)


def main(descriptor: str, make: str, arguments: str) -> None:
    """Begin.

    Parameters
    ----------
    descriptor : str
        Of the socket to the parent.
    make : str
        What makes the engine, as module:name.
    arguments : str
        For it, as JSON.
    """
    # A supervisor or a terminal signals all processes at once: the parent decides when the scan ends.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    Inference(Connection(int(descriptor)), resolve_name(make)(**json.loads(arguments))).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
