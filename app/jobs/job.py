"""A job as everyone outside `app.jobs.workflow` sees it."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Priority = Literal["routine", "stat"]
ENDED: tuple[State, ...] = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Job:
    """One scan on its way through the service.

    Attributes
    ----------
    id : str
        Not to be guessed, and nothing of the scan can be read from it.
    state : {"queued", "running", "succeeded", "failed", "cancelled"}
    stage : str or None
        "read", "infer" or "export" while it runs.
    progress : float
        Share of the whole job that is done, 0 to 1.
    model : str or None
        Id of the model that was used; until it ended, what the caller named.
    created, started, ended : datetime or None
        UTC.
    problem : dict or None
        Why it failed: `CounterpartError.problem`.
    content : str
        Hash of bytes, model and parameters.
    priority : {"routine", "stat"}
        Which queue it stands in: stat goes first.
    results : tuple of str
        Names of the files that it has; none until it succeeded.
    """

    id: str
    state: State
    stage: str | None
    progress: float
    model: str | None
    created: datetime
    started: datetime | None
    ended: datetime | None
    problem: dict[str, str] | None
    content: str
    priority: Priority = "routine"
    results: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cursor:
    """A place in the list of jobs, newest first: the last one that was seen."""

    created: datetime
    id: str

    def __str__(self) -> str:
        return f"{int(self.created.timestamp() * 1_000_000)}-{self.id}"


@dataclass(frozen=True)
class Which:
    """Which jobs of the list; all that is given must hold.

    Attributes
    ----------
    states : tuple of str
        Any of these; none means all.
    priority : {"routine", "stat"}, optional
    model : str, optional
        Name or id of the model that was used; until the job ended, of the one that was asked for.
    code : str, optional
        Of the problem that it failed with.
    created_after, created_before : datetime, optional
        When it was sent: from the first, up to the second without it.
    """

    states: tuple[State, ...] = ()
    priority: Priority | None = None
    model: str | None = None
    code: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
