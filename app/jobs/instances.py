"""Index of the DICOM results of succeeded jobs, in the database of the jobs, so that a search reads only its page.

A row has the UIDs of an instance, its SOP class, its modality and the date of its study, and nothing else of its
header. Rows are added by the searches that miss them (`app.api.catalogue`), and erased with their job.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from app.jobs.database import create_tables, workflow_table

T = TypeVar("T")
Level = Literal["study", "series", "instance"]
# The status of a succeeded job in DBOS's table.
SUCCEEDED = "SUCCESS"

metadata = sa.MetaData()
indexed_table = sa.Table("counterpart_indexed_jobs", metadata, sa.Column("job", sa.Text, primary_key=True))
instances_table = sa.Table(
    "counterpart_instances",
    metadata,
    sa.Column("job", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("study", sa.Text, nullable=False, index=True),
    sa.Column("series", sa.Text, nullable=False, index=True),
    sa.Column("instance", sa.Text, nullable=False, index=True),
    sa.Column("sop_class", sa.Text),
    sa.Column("modality", sa.Text),
    sa.Column("study_date", sa.Text),
)


@dataclass(frozen=True)
class IndexedInstance:
    """DICOM result of a job.

    Attributes
    ----------
    job, name : str
        Id of the job, name of the result.
    study, series, instance : str
        UIDs.
    sop_class, modality, study_date : str or None
        As in the header.
    """

    job: str
    name: str
    study: str
    series: str
    instance: str
    sop_class: str | None = None
    modality: str | None = None
    study_date: str | None = None


@dataclass(frozen=True)
class InstanceFilter:
    """Conditions on instances. An instance must meet all of them.

    Attributes
    ----------
    accepted : mapping of str to collection of str
        Accepted values of a field of `IndexedInstance`.
    first_date, last_date : str
        Range of the study date, both ends included. A shorter text is the start of a date. Empty: no limit.
    modalities : collection of str
        The study or series has an instance of one of these modalities. Empty: no condition.
    """

    accepted: Mapping[str, Collection[str]] = field(default_factory=dict)
    first_date: str = ""
    last_date: str = ""
    modalities: Collection[str] = ()


class InstanceIndex:
    """The rows of all processes that share a database.

    Parameters
    ----------
    database : sqlalchemy.Engine
    workflow : str
        Name of the workflow of the jobs.
    """

    def __init__(self, database: sa.Engine, workflow: str) -> None:
        self._database = database
        self._insert = postgresql.insert if database.dialect.name == "postgresql" else sqlite.insert
        self._jobs = workflow_table(database)
        self._succeeded = (self._jobs.c.name == workflow, self._jobs.c.status == SUCCEEDED)
        self._rows = instances_table.join(self._jobs, self._jobs.c.workflow_uuid == instances_table.c.job)

    def create_tables(self) -> None:
        """Create the tables if they are missing. Two processes may do so at once."""
        create_tables(self._database, metadata)

    # ---- fill ----

    def missing(self, limit: int) -> list[str]:
        """Return succeeded jobs that are not in the index, the newest first."""
        t = self._jobs.c
        known = sa.exists().where(indexed_table.c.job == t.workflow_uuid)
        query = sa.select(t.workflow_uuid).where(*self._succeeded, ~known)
        with self._database.connect() as connection:
            return list(connection.execute(query.order_by(t.created_at.desc()).limit(limit)).scalars())

    def add(self, found: Mapping[str, Sequence[IndexedInstance]]) -> None:
        """Add jobs with their instances. A job that is in the index, or was erased, stays as it is."""
        jobs = sa.select(self._jobs.c.workflow_uuid).where(self._jobs.c.workflow_uuid.in_(found))
        new = self._insert(indexed_table).from_select(["job"], jobs).on_conflict_do_nothing()
        with self._database.begin() as connection:
            added = list(connection.execute(new.returning(indexed_table.c.job)).scalars())
            rows = [
                {"position": position, **asdict(instance)}
                for job in added
                for position, instance in enumerate(found[job])
            ]
            if rows:
                connection.execute(instances_table.insert(), rows)

    def erase(self, job: str) -> None:
        """Remove a job."""
        self._delete(lambda column: column == job)

    def remove_orphans(self) -> None:
        """Remove the jobs that do not exist."""
        jobs = sa.select(self._jobs.c.workflow_uuid)
        self._delete(lambda column: column.not_in(jobs))

    def _delete(self, condition: Callable[[sa.Column[str]], sa.ColumnElement[bool]]) -> None:
        with self._database.begin() as connection:
            for table in (instances_table, indexed_table):
                connection.execute(table.delete().where(condition(table.c.job)))

    # ---- find ----

    def find(self, **uids: str | None) -> list[IndexedInstance]:
        """Return the instances with these UIDs of `study`, `series` and `instance`, those of the newest job first."""
        conditions = [instances_table.c[level] == uid for level, uid in uids.items() if uid is not None]
        return self._read(*conditions)

    def of(self, level: Level, uids: Collection[str]) -> list[IndexedInstance]:
        """Return the instances of studies, series or instances, those of the newest job first."""
        return self._read(instances_table.c[level].in_(uids))

    def _read(self, *conditions: sa.ColumnElement[bool]) -> list[IndexedInstance]:
        t, jobs = instances_table.c, self._jobs.c
        columns = [t[column.name] for column in fields(IndexedInstance)]
        query = sa.select(*columns).select_from(self._rows).where(*self._succeeded, *conditions)
        query = query.order_by(jobs.created_at.desc(), t.job.desc(), t.position)
        with self._database.connect() as connection:
            return [IndexedInstance(*row) for row in connection.execute(query)]

    def page(self, level: Level, wanted: InstanceFilter, limit: int, offset: int) -> list[str]:
        """Return the UIDs of the studies, series or instances with a matching instance, those of the newest job first.

        Parameters
        ----------
        level : {"study", "series", "instance"}
        wanted : InstanceFilter
        limit, offset : int
            Largest number of UIDs, and the number of UIDs to leave out.
        """
        t, created = instances_table.c, self._jobs.c.created_at
        query = self._select(level, wanted, t[level]).group_by(t[level])
        query = query.order_by(sa.func.max(created).desc(), sa.func.max(t.job).desc(), sa.func.min(t.position))
        with self._database.connect() as connection:
            return list(connection.execute(query.limit(limit).offset(offset)).scalars())

    def count(self, level: Level, wanted: InstanceFilter) -> int:
        """Return the number of UIDs that `page` would return without a limit."""
        query = self._select(level, wanted, sa.func.count(instances_table.c[level].distinct()))
        with self._database.connect() as connection:
            return connection.execute(query).scalar_one()

    def _select(self, level: Level, wanted: InstanceFilter, column: sa.ColumnElement[T]) -> sa.Select[T]:
        t = instances_table.c
        conditions: list[sa.ColumnElement[bool]] = [t[name].in_(values) for name, values in wanted.accepted.items()]
        if wanted.first_date:
            conditions.append(t.study_date >= wanted.first_date)
        if wanted.last_date:
            conditions.append(sa.func.substr(t.study_date, 1, len(wanted.last_date)) <= wanted.last_date)
        if wanted.modalities:
            conditions.append(t[level].in_(sa.select(t[level]).where(t.modality.in_(wanted.modalities))))
        return sa.select(column).select_from(self._rows).where(*self._succeeded, *conditions)
