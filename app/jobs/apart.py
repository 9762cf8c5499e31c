"""Inference in a process of its own, so that what a scan does to its process is done to that scan alone.

The worker keeps the queue, the store and its promises; the child reads, infers and exports, and is told
nothing else. When the child dies (a crash in a library, the kernel's killer of large processes), the worker
lives to see whose scan it was. When memory ran out the child is let go, and all that it held with it. And a
child that computes does not keep the worker, which may be the API as well, from answering.

They speak JSON over a pair of sockets::

    worker   {"warm": true}, {"scan", "out", "request", "guard"}, the same with "inferred", {"stop": true}
    child    {"ready": true}, {"progress": [stage, fraction]}, {"inferred": true}, {"report"}, {"problem"}, {"fault"}
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import Pipe
from pathlib import Path
from threading import Lock
from typing import Any

from app.analysis import AnalysisRequest, Progress
from app.errors import NotReady, OutOfMemory, from_problem
from app.export.report import Report
from app.jobs.engine import Engine, ProcessDied, Unexpected
from app.manifest import Manifest

# Between two looks at whether the job is still wanted, where the child says nothing.
LOOK_SECONDS = 0.1
# A child that was told to stop stops between two network evaluations; one that does not is killed.
STOP_SECONDS = 0.3
END_SECONDS = 5.0


class Apart:
    """An engine that runs another one in a child process, which it starts again when it has died.

    Parameters
    ----------
    known : Engine
        Answers what needs no inference; never warmed up.
    make : str
        What makes the child's engine, as module:name.
    arguments : dict
        For it; what JSON can hold.
    """

    def __init__(self, known: Engine, make: str, arguments: dict[str, Any]) -> None:
        self._known = known
        self._words = (make, json.dumps(arguments))
        self._child: Child | None = None
        self._guard = False
        # One scan at a time, and none while the models are loaded.
        self._lock = Lock()

    @property
    def provider(self) -> str:
        """Where networks run."""
        return self._known.provider

    @property
    def manifests(self) -> Sequence[Manifest]:
        """The models there are."""
        return self._known.manifests

    def card(self, model: str) -> str | None:
        """Model card of a model's id."""
        return self._known.card(model)

    def warm_up(self) -> None:
        """Load every model in the child and see it work; raises what is wrong.

        Raises
        ------
        NotReady
            The child ended.
        """
        with self._lock:
            child = self._living()
            child.say({"warm": True})
            try:
                while (message := child.hear(None)) != {"ready": True}:
                    _raise(message)
            except ProcessDied as died:
                raise NotReady(
                    f"The process of the inference ended while it loaded the models ({died}).",
                    expected="models that load.",
                    advice="Run `counterpart doctor`; the machine may be short of memory.",
                ) from None

    def infer(self, scan: Path, out: Path, request: AnalysisRequest, progress: Progress) -> None:
        """Have a scan inferred by the child; see `Engine.infer`.

        Raises
        ------
        ProcessDied
            The child ended in it.
        Unexpected
            Something that is no `CounterpartError`.
        """
        self._ask({"scan": str(scan), "out": str(out), "request": asdict(request)}, "read", progress)

    def export(self, scan: Path, inferred: Path, out: Path, request: AnalysisRequest, progress: Progress) -> Report:
        """Have the results written by the child, which knows them still or reads what was inferred.

        Raises
        ------
        ProcessDied, Unexpected
            As of `infer`.
        """
        asked = {"scan": str(scan), "inferred": str(inferred), "out": str(out), "request": asdict(request)}
        return Report.model_validate(self._ask(asked, "export", progress)["report"])

    def guard(self, *, on: bool) -> None:
        """Whether the child may not take more memory than there is for it at the beginning of a scan."""
        # On a GPU the driver's address space says nothing of memory.
        self._guard = on and self.provider == "cpu"

    def close(self) -> None:
        """End the child."""
        self._end()

    def _ask(self, asked: dict[str, Any], stage: str, progress: Progress) -> dict[str, Any]:
        """The child's answer; `stage` is what it is at as long as it says nothing."""
        while not self._lock.acquire(timeout=LOOK_SECONDS):
            progress(stage, 0.0)
        try:
            return self._listen(self._living(), {**asked, "guard": self._guard}, stage, progress)
        except OutOfMemory:
            self._end()  # onnxruntime and Python keep what they once had
            raise
        finally:
            self._lock.release()

    def _listen(self, child: "Child", asked: dict[str, Any], stage: str, progress: Progress) -> dict[str, Any]:
        child.say(asked)
        told: tuple[str, float] = (stage, 0.0)
        while True:
            message = child.hear(LOOK_SECONDS)
            if "report" in message or "inferred" in message:
                return message
            if message and "progress" not in message:
                _raise(message)
            now, fraction = message.get("progress", told)
            told = (now, fraction)
            try:
                progress(*told)
            except BaseException:
                if not child.stopped():
                    self._end()
                raise

    def _living(self) -> "Child":
        if self._child is None or not self._child.lives():
            self._end()
            self._child = Child(self._words)
        return self._child

    def _end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


class Child:
    """The child as its parent sees it.

    Parameters
    ----------
    words : sequence of str
        For `app.jobs.child`.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._wire, theirs = Pipe()
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-P", "-m", "app.jobs.child", str(theirs.fileno()), *words]
        # It has no log: what libraries print of themselves can hold patient data.
        nothing = subprocess.DEVNULL
        self._process = subprocess.Popen(  # noqa: S603  # this interpreter, and our own words
            command, env=environ, pass_fds=[theirs.fileno()], stdin=nothing, stdout=nothing, stderr=nothing
        )
        theirs.close()

    def lives(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def say(self, message: dict[str, Any]) -> None:
        """Tell it; that it has ended shows when it is listened to."""
        with suppress(OSError):
            self._wire.send_bytes(json.dumps(message).encode())

    def hear(self, seconds: float | None) -> dict[str, Any]:
        """What it says next; nothing where it says nothing for so long.

        Raises
        ------
        ProcessDied
        """
        try:
            if not self._wire.poll(seconds):
                return {}
            message: dict[str, Any] = json.loads(self._wire.recv_bytes())
        except (EOFError, OSError):
            raise ProcessDied(self._status()) from None
        return message

    def stopped(self) -> bool:
        """Ask it to stop what it is at, and tell whether it soon did."""
        self.say({"stop": True})
        try:
            while message := self.hear(STOP_SECONDS):
                if "progress" not in message:
                    return True
        except ProcessDied:
            pass
        return False

    def _status(self) -> int:
        """How it ended, which it does as soon as its end of the wire is closed."""
        try:
            return self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def end(self) -> None:
        """Kill it: it holds nothing that anyone needs."""
        self._process.kill()
        self._process.wait()
        self._wire.close()


def _raise(message: dict[str, Any]) -> None:
    if "problem" in message:
        raise from_problem(message["problem"])
    raise Unexpected(message["fault"])
