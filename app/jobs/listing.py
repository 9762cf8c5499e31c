"""Jobs as they are read: one, all of a kind, a page of them, the queue."""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from dbos import DBOS, WorkflowStatus

from app import errors
from app.jobs.database import workflow_status
from app.jobs.job import Cursor, Job, Which
from app.jobs.records import PRIORITIES, STATES, to_job

WORKFLOW = "analyse_scan"
JOB_ID = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
WAITING = [name for name, state in STATES.items() if state == "queued"]


class Listing:
    """What can be asked about jobs; every method blocks, and none may run on an event loop.

    Parameters
    ----------
    database : sqlalchemy.Engine
    """

    def __init__(self, database: sa.Engine) -> None:
        self._database = database
        self._table = workflow_status(database)

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

    def page(self, which: Which, limit: int, after: Cursor | None) -> Sequence[Job]:
        """Jobs, newest first; the same place in the list whatever came since.

        Parameters
        ----------
        which : Which
        limit : int
            Most jobs of a page.
        after : Cursor or None
            The last job of the page before.
        """
        t = self._table.c
        query = sa.select(t.workflow_uuid).where(t.name == WORKFLOW, *self._conditions(which))
        if after is not None:
            # Many jobs may come in one tick of the clock, which is a second on SQLite: their ids order those.
            last = (_milliseconds(after.created), after.id)
            query = query.where(sa.tuple_(t.created_at, t.workflow_uuid) < last)
        query = query.order_by(t.created_at.desc(), t.workflow_uuid.desc()).limit(limit)
        with self._database.connect() as connection:
            ids = list(connection.execute(query).scalars())
        found = {job.id: job for job in (self._list(workflow_ids=ids) if ids else [])}
        return [found[job] for job in ids if job in found]

    def places(self) -> dict[str, int]:
        """Place in the queue of every waiting job, 1 for the next."""
        t = self._table.c
        # In the order in which DBOS hands them out.
        query = sa.select(t.workflow_uuid).where(t.name == WORKFLOW, t.status.in_(WAITING))
        with self._database.connect() as connection:
            waiting = connection.execute(query.order_by(t.priority, t.created_at)).scalars()
            return {job: place for place, job in enumerate(waiting, start=1)}

    def _conditions(self, which: Which) -> Iterator[sa.ColumnElement[bool]]:
        t = self._table.c
        if which.states:
            yield t.status.in_([name for name, state in STATES.items() if state in which.states])
        if which.priority:
            asked = PRIORITIES[which.priority]
            yield t.priority.in_([asked, asked + 1])  # one more where it lost a worker
        if which.model:
            used = t.attributes["model"].as_string()
            # A name stands for all its versions, which begin with a digit: "t1" is not "t1-flair".
            versions = (used.startswith(f"{which.model}-{digit}", autoescape=True) for digit in range(10))
            yield sa.or_(used == which.model, *versions)
        if which.code:
            yield t.attributes["code"].as_string() == which.code
        if which.created_after:
            yield t.created_at >= _milliseconds(which.created_after)
        if which.created_before:
            yield t.created_at < _milliseconds(which.created_before)

    def _list(self, **what: Any) -> list[Job]:
        return [to_job(status) for status in self._statuses(**what)]

    def _statuses(self, **what: Any) -> list[WorkflowStatus]:
        return DBOS.list_workflows(name=WORKFLOW, load_input=False, **what)


def _milliseconds(time: datetime) -> int:
    return round(time.timestamp() * 1000)
