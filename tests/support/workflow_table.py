"""Table of the jobs for tests that need no running job service."""

import sqlalchemy as sa

from app.jobs.database import workflow_table


def create_workflow_table(database: sa.Engine) -> None:
    """Create the columns of DBOS's table that an index of jobs reads."""
    table = workflow_table(database)
    with database.begin() as connection:
        if table.schema:
            connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {table.schema}"))
        columns = "workflow_uuid TEXT PRIMARY KEY, name TEXT, status TEXT, created_at BIGINT"
        connection.execute(sa.text(f"CREATE TABLE {table.fullname} ({columns})"))
