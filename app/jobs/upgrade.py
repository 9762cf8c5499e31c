"""Scans that code with other steps has begun: what it recorded means nothing to this code, which begins them again."""

import sqlalchemy as sa

from app.jobs.database import recorded_steps, workflow_status

ENQUEUED, PENDING = "ENQUEUED", "PENDING"


def begin_again(database: sa.Engine, workflow: str, version: str, dead: str | None = None) -> list[str]:
    """Take over what other versions left, to be done from its beginning; DBOS gives it to nobody else.

    Parameters
    ----------
    database : sqlalchemy.Engine
    workflow : str
        Name of the workflow.
    version : str
        Of the steps of this code.
    dead : str or None
        A worker that died: also what it held. Without, only what was handed back to the queue. What a living
        worker of another version holds is its own.

    Returns
    -------
    list of str
        The jobs. Two processes that do it at once share them out.
    """
    status, steps = workflow_status(database), recorded_steps(database)
    left = status.c.status == ENQUEUED
    if dead is not None:
        left = sa.or_(left, sa.and_(status.c.status == PENDING, status.c.executor_id == dead))
    others = status.c.application_version != version  # of a job that nobody has begun it is null
    taken = status.update().where(status.c.name == workflow, left, others).values(application_version=version)
    with database.begin() as connection:
        # The update locks the rows: no worker of the other version can claim one meanwhile.
        jobs = list(connection.execute(taken.returning(status.c.workflow_uuid)).scalars())
        if jobs:
            connection.execute(steps.delete().where(steps.c.workflow_uuid.in_(jobs)))
    return jobs
