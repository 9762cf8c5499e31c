"""DBOS's record of a workflow as a `Job`."""

from datetime import UTC, datetime
from typing import cast

from dbos import PortableWorkflowError, WorkflowStatus

from app import errors
from app.export.outputs import REQUIRED_NAMES
from app.jobs.job import Job, Priority, State

# DBOS's names for ours. PENDING is a workflow that a process has claimed.
STATES: dict[str, State] = {
    "DELAYED": "queued",
    "ENQUEUED": "queued",
    "PENDING": "running",
    "SUCCESS": "succeeded",
    "ERROR": "failed",
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "failed",  # only where an older version gave up
    "CANCELLED": "cancelled",
}
# DBOS takes the smallest first, and jobs of one in the order they came. The odd numbers behind these are
# for jobs that lost a worker: `Roster.demote`.
PRIORITIES: dict[Priority, int] = {"stat": 2, "routine": 10}
# A failed, cancelled or erased job never answers for the same content again.
ANSWERING = [name for name, state in STATES.items() if state not in ("failed", "cancelled")]


def to_job(status: WorkflowStatus) -> Job:
    """A job, from its workflow's status, attributes and outcome."""
    kept = status.attributes or {}
    state = STATES[status.status]
    output = status.output if isinstance(status.output, dict) else {}
    return Job(
        id=status.workflow_id,
        state=state,
        stage=kept.get("stage") if state == "running" else None,
        progress=1.0 if state == "succeeded" else kept.get("progress", 0.0),
        model=output.get("model") or kept.get("model"),
        # A job of 0.1.0 does not say: it has what there was then.
        results=tuple(output.get("results") or REQUIRED_NAMES) if state == "succeeded" else (),
        created=cast("datetime", _time(status.created_at)),
        started=_time(status.dequeued_at),
        ended=_time(status.completed_at),
        problem=_problem(status) if state == "failed" else None,
        content=kept.get("content", ""),
        priority="stat" if (status.priority or 0) in {2, 3} else "routine",
    )


def _problem(status: WorkflowStatus) -> dict[str, str]:
    if isinstance(status.error, PortableWorkflowError) and isinstance(status.error.data, dict):
        return cast("dict[str, str]", status.error.data)
    return errors.InternalError(
        "The job ended without a result.",
        expected="an analysis that ends in a result or a reason.",
        advice="Send the scan again; if it fails again, report the job's id.",
    ).problem


def _time(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)
