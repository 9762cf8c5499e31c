"""Outbox of webhooks: one row for each ended job and target, kept until it is delivered or given up.

The rows come from the states of the jobs in the database, so that a process that dies loses no event. A row has the
same id in every process, so that each event is one row however often it is found. Bodies contain ids and states only.
"""

import hashlib
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import postgresql, sqlite

from app.jobs.database import create_tables, workflow_table
from app.jobs.job import ENDED_STATES
from app.jobs.queue import STATES, WORKFLOW

# Seconds between attempts, as Standard Webhooks recommends: three days in all.
PAUSES = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
JITTER = 0.2
# Seconds after which a claimed row is tried by another process: more than one attempt takes.
LEASE_SECONDS = 60
# The clocks of the machines may differ by as much, in milliseconds.
OVERLAP = 600_000
# Days for which delivered and given-up rows are kept.
KEEP_DELIVERED_DAYS, KEEP_DEAD_DAYS = 7, 90
DAY = 86_400_000
# Longest step of the clock back after which ended jobs are searched from the earlier time. It is shorter than
# `KEEP_DELIVERED_DAYS`, so that a row still excludes each job that was sent.
MAX_BACK = 6 * DAY

log = structlog.get_logger("counterpart.webhooks")
ENDED_STATUSES = tuple(status for status, state in STATES.items() if state in ENDED_STATES)

metadata = sa.MetaData()
table = sa.Table(
    "counterpart_webhooks",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("job", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("time", sa.BigInteger, nullable=False),  # end of the job, in milliseconds since the epoch
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),  # pending, delivered or dead
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due", sa.BigInteger, nullable=False),  # next attempt, in milliseconds since the epoch
    sa.Column("fault", sa.Text),  # of the last attempt
)
cursor_table = sa.Table(
    "counterpart_webhook_cursor",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)
CURSOR = "ended_jobs"


@dataclass(frozen=True)
class Message:
    """One event for one target.

    Attributes
    ----------
    id : str
        Value of `webhook-id`. A receiver ignores an id that it knows.
    job, state : str
    time : int
        End of the job, in milliseconds since the epoch.
    target : str
        URL.
    attempts : int
        Attempts so far.
    fault : str or None
        Why the last attempt failed.
    """

    id: str
    job: str
    state: str
    time: int
    target: str
    attempts: int
    fault: str | None

    @property
    def body(self) -> bytes:
        """Body of the request. It is the same in every attempt."""
        moment = datetime.fromtimestamp(self.time / 1000, UTC).isoformat(timespec="milliseconds")
        event = {"type": f"scan.{self.state}", "timestamp": moment, "data": {"job": self.job, "state": self.state}}
        return json.dumps(event, separators=(",", ":")).encode()


class Outbox:
    """The rows. Every method blocks, and several processes may call it at once.

    Parameters
    ----------
    database : sqlalchemy.Engine
    """

    def __init__(self, database: sa.Engine) -> None:
        self._database = database
        self._waits = False
        self._insert = postgresql.insert if database.dialect.name == "postgresql" else sqlite.insert

    def create_tables(self) -> None:
        """Create the tables if they are missing. Several processes may do so at once."""
        create_tables(self._database, metadata)

    def collect(self, targets: Sequence[str]) -> None:
        """Add a row for each job that has ended since the last call, and each target. The first call adds none."""
        start = _now()
        with self._database.begin() as connection:
            cursor = connection.execute(sa.select(cursor_table.c.value)).scalar_one_or_none()
            if cursor is None:
                first = self._insert(cursor_table).values(name=CURSOR, value=start)
                connection.execute(first.on_conflict_do_nothing())
                return
            if cursor - start <= MAX_BACK:
                rows = self._find_ended(connection, min(cursor, start) - OVERLAP, targets)
                if rows:
                    connection.execute(self._insert(table).on_conflict_do_nothing(), rows)
            elif self._has_ended_since(connection, start + OVERLAP):
                # The clock is behind now. It must not make jobs due whose rows are deleted, or that never had one.
                if not self._waits:
                    log.warning("webhooks wait, because jobs ended later than the present time of the clock")
                self._waits = True
                return
            self._waits = False
            # Seldom, because each update is a synced write. A cursor in the future is from a clock that was ahead.
            if abs(start - cursor) > OVERLAP:
                connection.execute(cursor_table.update().where(cursor_table.c.value == cursor).values(value=start))

    def _has_ended_since(self, connection: sa.Connection, since: int) -> bool:
        workflows = workflow_table(self._database).c
        newest = sa.select(sa.func.max(workflows.updated_at)).where(
            workflows.name == WORKFLOW, workflows.status.in_(ENDED_STATUSES)
        )
        return int(connection.execute(newest).scalar_one() or 0) > since

    def _find_ended(self, connection: sa.Connection, since: int, targets: Sequence[str]) -> list[dict[str, object]]:
        """Return the rows of the jobs that ended since a time and have none."""
        workflows = workflow_table(self._database).c
        ended = sa.select(workflows.workflow_uuid, workflows.status, workflows.updated_at).where(
            workflows.name == WORKFLOW,
            workflows.status.in_(ENDED_STATUSES),
            workflows.updated_at >= since,
            workflows.workflow_uuid.not_in(sa.select(table.c.job)),
        )
        found = connection.execute(ended).all()
        return [_new_row(job, STATES[status], moment, target) for job, status, moment in found for target in targets]

    def claim(self, limit: int) -> list[Message]:
        """Return messages that are due, and let no other process send them for a while. The attempt counts now."""
        now = _now()
        due = sa.select(table).where(table.c.status == "pending", table.c.due <= now).order_by(table.c.due).limit(limit)
        claimed = []
        with self._database.begin() as connection:
            for row in connection.execute(due).all():
                unchanged = (table.c.id == row.id, table.c.attempts == row.attempts, table.c.status == "pending")
                values = {"attempts": row.attempts + 1, "due": now + LEASE_SECONDS * 1000}
                if connection.execute(table.update().where(*unchanged).values(values)).rowcount:
                    claimed.append(_to_message(row, row.attempts + 1))
        return claimed

    def mark_delivered(self, message: Message) -> None:
        """Record that the target has accepted a message."""
        self._update(message.id, status="delivered", fault=None)

    def mark_failed(self, message: Message, fault: str, *, give_up: bool = False) -> bool:
        """Record a failed attempt, and return whether it was the last one.

        If the attempt lasted longer than its lease and another process has tried again, nothing is recorded.
        """
        is_latest = (table.c.status == "pending", table.c.attempts == message.attempts)
        if give_up or message.attempts > len(PAUSES):
            return self._update(message.id, *is_latest, status="dead", fault=fault)
        pause = PAUSES[message.attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  # no secret
        self._update(message.id, *is_latest, due=_now() + round(pause * 1000), fault=fault)
        return False

    def list_failed(self, limit: int = 1000) -> list[Message]:
        """Return the messages that were given up, the newest first."""
        query = sa.select(table).where(table.c.status == "dead").order_by(table.c.time.desc(), table.c.id).limit(limit)
        with self._database.connect() as connection:
            return [_to_message(row, row.attempts) for row in connection.execute(query)]

    def count_failed(self) -> int:
        """Return the number of messages that were given up."""
        query = sa.select(sa.func.count()).select_from(table).where(table.c.status == "dead")
        with self._database.connect() as connection:
            return connection.execute(query).scalar_one()

    def retry(self, message_id: str) -> bool:
        """Start the attempts of a given-up message again, and return whether there is one with this id."""
        return self._update(message_id, table.c.status == "dead", status="pending", attempts=0, due=_now())

    def delete_expired(self) -> None:
        """Delete rows that were delivered or given up long ago."""
        now = _now()
        with self._database.begin() as connection:
            for status, days in (("delivered", KEEP_DELIVERED_DAYS), ("dead", KEEP_DEAD_DAYS)):
                old = (table.c.status == status, table.c.time < now - days * DAY)
                connection.execute(table.delete().where(*old))

    def _update(self, message_id: str, *conditions: sa.ColumnElement[bool], **values: object) -> bool:
        with self._database.begin() as connection:
            update = table.update().where(table.c.id == message_id, *conditions).values(**values)
            return connection.execute(update).rowcount > 0


def _new_row(job: str, state: str, ended: int, target: str) -> dict[str, object]:
    digest = hashlib.sha256(f"{job}\0{state}\0{target}".encode()).hexdigest()[:32]
    fields = {"id": f"msg_{digest}", "job": job, "state": state, "time": ended, "target": target}
    return {**fields, "status": "pending", "attempts": 0, "due": 0, "fault": None}


def _to_message(row: sa.Row[tuple[object, ...]], attempts: int) -> Message:
    return Message(row.id, row.job, row.state, row.time, row.target, attempts, row.fault)


def _now() -> int:
    return round(time.time() * 1000)
