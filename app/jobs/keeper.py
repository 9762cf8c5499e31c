"""What every process does beside its work: tell that it lives, and notice who no longer does."""

import threading
import time
from typing import Protocol

import structlog

from app.jobs.roster import BEAT_SECONDS, Roster, Watch
from app.jobs.runner import where

# Between two looks at what is kept; the first comes at once.
RETAIN_SECONDS = 600.0

log = structlog.get_logger("counterpart.jobs")


class Custody(Protocol):
    """What the keeper needs of whoever keeps the jobs."""

    def holders(self) -> set[str]:
        """Names of the workers that hold a job."""

    def take_back(self, worker: str) -> list[str]:
        """Put the jobs of a dead worker back into the queue, and return them."""

    def retain(self) -> None:
        """Erase what is kept too long."""


class Keeper:
    """A thread that beats for this worker and takes back the jobs of dead ones.

    Parameters
    ----------
    roster : Roster
    custody : Custody
    """

    def __init__(self, roster: Roster, custody: Custody) -> None:
        self._roster = roster
        self._custody = custody
        self._watch = Watch()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, worker: str | None, dead: str) -> None:
        """Take over from the dead of this slot at once, then keep watch.

        Parameters
        ----------
        worker : str or None
            The name to beat for.
        dead : str
            Beginning of the names of those who held this slot.
        """
        if worker:
            self._roster.beat(worker)
        for name in self._roster.beats().keys() | self._custody.holders():
            if name.startswith(dead) and name != worker:
                self._bury(name)
        self._thread = threading.Thread(target=self._run, args=(worker,), name="keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, worker: str | None) -> None:
        retained = -RETAIN_SECONDS
        while not self._ended.wait(BEAT_SECONDS):
            try:
                if worker:
                    self._roster.beat(worker)
                self._look()
                if time.monotonic() - retained > RETAIN_SECONDS:
                    retained = time.monotonic()
                    self._custody.retain()
            except Exception as error:  # noqa: BLE001  # a database that is away comes back
                log.warning("keeper", **where(error))

    def _look(self) -> None:
        beats = {**dict.fromkeys(self._custody.holders(), -1), **self._roster.beats()}
        for name in self._watch.dead(beats, time.monotonic()):
            self._bury(name)

    def _bury(self, worker: str) -> None:
        jobs = self._custody.take_back(worker)
        self._roster.leave(worker)
        for job in jobs:
            log.warning("worker lost", job=job)
