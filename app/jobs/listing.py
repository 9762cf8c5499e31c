"""Jobs as they are read: one, all of a kind, a page of them, the queue."""

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from dbos import DBOS, WorkflowStatus

from app import errors
from app.jobs.job import Cursor, Job, State
from app.jobs.records import STATES, exactly, to_job

WORKFLOW = "analyse_scan"
JOB_ID = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
WAITING = [name for name, state in STATES.items() if state == "queued"]


class Listing:
    """What can be asked about jobs; every method blocks, and none may run on an event loop."""

    def get(self, job: str) -> Job:
        """A job.

        Raises
        ------
        NotFound
            There is none of this id.
        """
        found = self._list(workflow_ids=[job]) if JOB_ID.fullmatch(job) else []
        if not found:
            raise errors.NotFound(
                "There is no job of this id.",
                expected="an id that POST /v1/scans answered, of a job that was not erased.",
                advice="List the jobs with GET /v1/scans, or send the scan again.",
            )
        return found[0]

    def page(self, states: Sequence[State], limit: int, after: Cursor | None) -> Sequence[Job]:
        """Jobs, newest first; the same place in the list whatever came since."""
        names = [name for name, state in STATES.items() if state in states] or None
        before = exactly(after.created - timedelta(milliseconds=1)) if after else None
        older = self._list(status=names, end_time=before, limit=limit, sort_desc=True)
        # SQLite's clock ticks in whole seconds, and jobs of one tick are in no order: the first and
        # the last tick are read whole, and sorted here.
        ticks = {after.created} if after else set()
        ticks |= {older[-1].created} if older else set()
        whole = [
            self._list(status=names, start_time=exactly(tick), end_time=exactly(tick), sort_desc=True) for tick in ticks
        ]
        found = {job.id: job for part in (older, *whole) for job in part}
        newest_first = sorted(found.values(), key=lambda job: (job.created, job.id), reverse=True)
        last = (after.created, after.id) if after else None
        return [job for job in newest_first if last is None or (job.created, job.id) < last][:limit]

    def places(self) -> dict[str, int]:
        """Place in the queue of every waiting job, 1 for the next."""
        waiting = sorted(self._statuses(status=WAITING, load_output=False), key=lambda status: status.priority or 0)
        return {status.workflow_id: place for place, status in enumerate(waiting, start=1)}

    def _list(self, **what: Any) -> list[Job]:
        return [to_job(status) for status in self._statuses(**what)]

    def _statuses(self, **what: Any) -> list[WorkflowStatus]:
        return DBOS.list_workflows(name=WORKFLOW, load_input=False, **what)
