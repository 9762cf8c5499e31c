"""Verdicts of readers on findings, in the database of the jobs. They never change a result.

Each verdict is a row, so that the history of a finding is kept. The latest row of a reader for a finding counts. The
rows of a job are erased with it.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, cast

import sqlalchemy as sa

from app.errors import NotFound
from app.jobs.database import create_tables, workflow_table

Verdict = Literal["right", "wrong", "unsure"]
PAGE_ROWS = 1000

metadata = sa.MetaData()
reviews_table = sa.Table(
    "counterpart_reviews",
    metadata,
    # SQLite numbers the rows of an INTEGER only.
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("job", sa.Text, nullable=False, index=True),
    sa.Column("label", sa.Integer, nullable=False),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("reader", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    # The finding as the reader saw it, so that the export reads no report.
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("code_version", sa.Text, nullable=False),
    sa.Column("volume_ml", sa.Float, nullable=False),
    sa.Column("peak_score", sa.Float, nullable=False),
)


@dataclass(frozen=True)
class ReviewedFinding:
    """Finding of a job, as its report describes it.

    Attributes
    ----------
    job : str
    label : int
    model : str
        Id of the model, which contains its version.
    code_version : str
        Version of Counterpart.
    volume_ml, peak_score : float
    """

    job: str
    label: int
    model: str
    code_version: str
    volume_ml: float
    peak_score: float


@dataclass(frozen=True)
class Review:
    """Verdict of one reader on one finding.

    Attributes
    ----------
    finding : ReviewedFinding
    verdict : {"right", "wrong", "unsure"}
    note : str
        Text of the reader. It may contain patient data, so it is not logged.
    reader : str
        Name of the reader, "" if it is unknown.
    time : datetime
        UTC.
    """

    finding: ReviewedFinding
    verdict: Verdict
    note: str
    reader: str
    time: datetime


class Reviews:
    """The verdicts on the findings of all jobs. Several processes may use it at once.

    Parameters
    ----------
    database : sqlalchemy.Engine
    """

    def __init__(self, database: sa.Engine) -> None:
        self._database = database
        self._workflows = workflow_table(database)

    def create_table(self) -> None:
        """Create the table if it is missing."""
        create_tables(self._database, metadata)

    def put(self, finding: ReviewedFinding, verdict: Verdict, note: str, reader: str) -> Review:
        """Record a verdict, and return it. If the reader's latest verdict is the same, nothing changes.

        Raises
        ------
        NotFound
            The job was erased in the meantime.
        """
        latest = [r for r in self.history(finding.job) if (r.finding.label, r.reader) == (finding.label, reader)][-1:]
        if latest and (latest[0].verdict, latest[0].note) == (verdict, note):
            return latest[0]
        review = Review(finding, verdict, note, reader, datetime.fromtimestamp(round(time.time(), 3), UTC))
        self._insert(review)
        return review

    def _insert(self, review: Review) -> None:
        t = self._workflows.c
        job = t.workflow_uuid == review.finding.job
        values = _to_row(review)
        row = sa.select(*(sa.literal(value, reviews_table.c[name].type) for name, value in values.items()))
        # The row of the job must exist when that of the review is written. SQLite does both in one statement, and
        # PostgreSQL locks the row of the job until the end of the transaction.
        exists = sa.exists(sa.select(t.workflow_uuid).where(job))
        insert = reviews_table.insert().from_select(list(values), row.where(exists)).returning(reviews_table.c.id)
        with self._database.begin() as connection:
            connection.execute(sa.select(t.workflow_uuid).where(job).with_for_update(read=True))
            number = connection.execute(insert).scalar_one_or_none()
        if number is None:
            raise NotFound(
                "The job was erased.", expected="a job that exists.", advice="List the jobs with GET /v1/scans."
            )

    def history(self, job: str) -> Sequence[Review]:
        """Return all verdicts on the findings of a job, in the order of their time."""
        query = sa.select(reviews_table).where(reviews_table.c.job == job).order_by(reviews_table.c.id)
        with self._database.connect() as connection:
            return [_from_row(row._mapping) for row in connection.execute(query)]

    def read_latest(self) -> Iterator[Sequence[Review]]:
        """Yield the latest verdict of each reader on each finding of all jobs in pages, in the order of their time.

        A verdict that is recorded meanwhile changes no page.
        """
        t, later = reviews_table.c, reviews_table.alias()
        with self._database.connect() as connection:
            last = connection.execute(sa.select(sa.func.max(t.id))).scalar_one() or 0
        same = (later.c.job == t.job, later.c.label == t.label, later.c.reader == t.reader)
        superseded = sa.exists().where(*same, later.c.id > t.id, later.c.id <= last)
        query = sa.select(reviews_table).where(~superseded, t.id <= last).order_by(t.id).limit(PAGE_ROWS)
        after = 0
        while after < last:
            with self._database.connect() as connection:
                rows = connection.execute(query.where(t.id > after)).all()
            if not rows:
                return
            yield [_from_row(row._mapping) for row in rows]
            after = rows[-1].id

    def remove(self, job: str, label: int, reader: str) -> None:
        """Remove the verdicts of a reader on a finding, its history included. Removing it again is not an error."""
        t = reviews_table.c
        self._delete(sa.and_(t.job == job, t.label == label, t.reader == reader))

    def erase(self, job: str) -> None:
        """Remove all verdicts on the findings of a job."""
        self._delete(reviews_table.c.job == job)

    def remove_orphans(self) -> None:
        """Remove the verdicts of jobs that do not exist."""
        self._delete(reviews_table.c.job.not_in(sa.select(self._workflows.c.workflow_uuid)))

    def count(self, jobs: Collection[str]) -> Mapping[str, Mapping[Verdict, int]]:
        """Return the number of readers' latest verdicts of each kind for each job, in one query."""
        t = reviews_table.c
        latest = sa.select(sa.func.max(t.id)).where(t.job.in_(jobs)).group_by(t.job, t.label, t.reader)
        query = sa.select(t.job, t.verdict, sa.func.count()).where(t.id.in_(latest)).group_by(t.job, t.verdict)
        counts: defaultdict[str, Counter[Verdict]] = defaultdict(Counter)
        with self._database.connect() as connection:
            for job, verdict, number in connection.execute(query):
                counts[job][verdict] = number
        return counts

    def _delete(self, condition: sa.ColumnElement[bool]) -> None:
        with self._database.begin() as connection:
            if self._database.dialect.name == "sqlite":
                # A note may contain patient data: SQLite overwrites it.
                connection.execute(sa.text("PRAGMA secure_delete=ON"))
            connection.execute(reviews_table.delete().where(condition))


def select_latest(history: Sequence[Review]) -> Sequence[Review]:
    """Return the latest verdict of each reader on each finding. The argument and the result are in order of time."""
    latest: dict[tuple[str, int, str], Review] = {}
    for review in history:
        key = (review.finding.job, review.finding.label, review.reader)
        latest.pop(key, None)  # a value that is replaced would keep its earlier position
        latest[key] = review
    return list(latest.values())


def _to_row(review: Review) -> dict[str, object]:
    return {
        "job": review.finding.job,
        "label": review.finding.label,
        "verdict": review.verdict,
        "note": review.note,
        "reader": review.reader,
        "at": review.time.timestamp(),
        "model": review.finding.model,
        "code_version": review.finding.code_version,
        "volume_ml": review.finding.volume_ml,
        "peak_score": review.finding.peak_score,
    }


def _from_row(row: sa.RowMapping) -> Review:
    finding = ReviewedFinding(
        row["job"], row["label"], row["model"], row["code_version"], row["volume_ml"], row["peak_score"]
    )
    moment = datetime.fromtimestamp(row["at"], UTC)
    return Review(finding, cast("Verdict", row["verdict"]), row["note"], row["reader"], moment)
