"""Public description of a job, free of any DBOS type."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Priority = Literal["routine", "stat"]
Order = Literal["newest", "oldest"]
ENDED_STATES: tuple[State, ...] = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class ResultSummary:
    """Numbers of a report that lists show. They are kept with the job, so that a list reads no report.

    Attributes
    ----------
    lesion_volume_ml : float
        Volume of the mask.
    findings_count : int
    scan_score : float
        Score of the whole scan in the out-of-distribution check.
    warnings_count : int
        Number of warnings about the result as a whole.
    """

    lesion_volume_ml: float
    findings_count: int
    scan_score: float
    warnings_count: int


@dataclass(frozen=True)
class Job:
    """Analysis of one scan.

    Attributes
    ----------
    id : str
        Random identifier. It reveals nothing about the scan.
    state : {"queued", "running", "succeeded", "failed", "cancelled"}
    stage : str or None
        "read", "infer" or "export" while the job runs, else None.
    progress : float
        Completed fraction of the whole job, 0 to 1.
    model : str or None
        Id of the model that was used. Until the job ends, the model that the caller named, or None.
    created, started, ended : datetime or None
        UTC times. `created` is always set.
    problem : dict or None
        `CounterpartError.problem` of a failed job, else None.
    content_hash : str
        Hash of the uploaded bytes, the eligible models and the parameters.
    priority : {"routine", "stat"}
        Priority class. Jobs with "stat" run before all jobs with "routine".
    results : tuple of str
        Names of the result files. Empty until the job has succeeded.
    summary : ResultSummary or None
        None until the job has succeeded, and for a job of a version that did not record it.
    is_routed : bool
        The service had routes for results when the job succeeded, so that the job may have deliveries.
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
    content_hash: str
    priority: Priority = "routine"
    results: tuple[str, ...] = ()
    summary: ResultSummary | None = None
    is_routed: bool = False


@dataclass(frozen=True)
class Cursor:
    """Position in the list of jobs, newest first: the last job of the previous page."""

    created: datetime
    id: str

    def __str__(self) -> str:
        return f"{int(self.created.timestamp() * 1_000_000)}-{self.id}"


@dataclass(frozen=True)
class JobFilter:
    """Conditions on the listed jobs. A job must meet all conditions that are set.

    Attributes
    ----------
    states : tuple of str
        Accepted states. Empty accepts every state.
    priority : {"routine", "stat"}, optional
    model : str, optional
        Name or id of the model that was used. Until a job ends, the model that the caller named counts.
    code : str, optional
        Error code of a failed job.
    created_after, created_before : datetime, optional
        Half-open interval of the submission time: the start is included, the end is not.
    """

    states: tuple[State, ...] = ()
    priority: Priority | None = None
    model: str | None = None
    code: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
