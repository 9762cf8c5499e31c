"""Deliveries of results to targets such as a PACS: one row for each job, target and result, with its state.

A job creates its rows in a recorded step after its results are published. Any process claims a row that is due, sends
the result and records the outcome. A claim ends by itself after `CLAIM_SECONDS` unless it is renewed, so that the rows
of a dead process are claimed again. A success is final, and any process that sent the result may record it. A result is
sent again only if its success was not recorded.
"""

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, cast

import sqlalchemy as sa

from app.jobs.database import create_tables

DeliveryState = Literal["pending", "sent", "failed"]
# Targets and results of a job, from the model and the names of its results.
Router = Callable[[str, Sequence[str]], Sequence[tuple[str, str]]]
Conditions = tuple[sa.ColumnElement[bool], ...]

# Seconds until a claim ends, unless its process renews it while it sends a large result.
CLAIM_SECONDS = 180.0
# Pause after the first failed attempt. It doubles after each further one.
RETRY_SECONDS, MAX_RETRY_SECONDS = 5.0, 900.0
# Doublings after which the pause has its largest value. Without a limit, the power would not fit into a float.
MAX_DOUBLINGS = 10

metadata = sa.MetaData()
deliveries_table = sa.Table(
    "counterpart_deliveries",
    metadata,
    sa.Column("job", sa.Text, primary_key=True),
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("result", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),  # in the order of the results
    sa.Column("state", sa.Text, nullable=False, index=True),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("code", sa.Text),
    sa.Column("since", sa.Float, nullable=False),  # start of the time after which the delivery is given up
    sa.Column("next_try", sa.Float, nullable=False),
    sa.Column("claim", sa.Text),
    sa.Column("ended", sa.Float),
)


@dataclass(frozen=True)
class Delivery:
    """Delivery of one result of a job to one target.

    Attributes
    ----------
    job, target, result : str
        Id of the job, name of the target, name of the result.
    state : {"pending", "sent", "failed"}
        A failed delivery is not tried again until `Deliveries.retry`.
    attempts : int
        Failed attempts, and the successful one.
    code : str or None
        Cause of the last failed attempt.
    since : datetime
        UTC time from which the time until the delivery is given up counts.
    next_try : datetime or None
        UTC time of the next attempt of a pending delivery, else None.
    ended : datetime or None
        UTC time at which the delivery was recorded as sent or failed.
    """

    job: str
    target: str
    result: str
    state: DeliveryState
    attempts: int
    code: str | None
    since: datetime
    next_try: datetime | None
    ended: datetime | None


@dataclass(frozen=True)
class Claim:
    """Right of one process to send a delivery."""

    delivery: Delivery
    token: str


class Deliveries:
    """The deliveries of all jobs, in the database.

    Parameters
    ----------
    database : sqlalchemy.Engine
    """

    def __init__(self, database: sa.Engine) -> None:
        self._database = database

    def create_table(self) -> None:
        """Create the table if it is missing. Two processes may do so at once."""
        create_tables(self._database, metadata)

    def plan(self, job: str, routes: Iterable[tuple[str, str]]) -> None:
        """Create the deliveries of a job, from pairs of target and result. Existing ones stay as they are."""
        t = deliveries_table.c
        now = time.time()
        with self._database.begin() as connection:
            query = sa.select(t.target, t.result).where(t.job == job)
            existing = {(row.target, row.result) for row in connection.execute(query)}
            for position, (target, result) in enumerate(dict.fromkeys(routes)):
                if (target, result) not in existing:
                    values = {"job": job, "target": target, "result": result, "position": position}
                    values |= {"state": "pending", "attempts": 0, "since": now, "next_try": now}
                    connection.execute(deliveries_table.insert().values(**values))

    def of_job(self, job: str) -> list[Delivery]:
        """Return the deliveries of a job, by target and in the order of the results."""
        t = deliveries_table.c
        query = sa.select(deliveries_table).where(t.job == job).order_by(t.target, t.position)
        with self._database.connect() as connection:
            return [_to_delivery(row) for row in connection.execute(query)]

    def count(self) -> dict[tuple[str, str], int]:
        """Return the number of deliveries by target and state."""
        t = deliveries_table.c
        query = sa.select(t.target, t.state, sa.func.count()).group_by(t.target, t.state)
        with self._database.connect() as connection:
            return {(row[0], row[1]): row[2] for row in connection.execute(query)}

    def ages(self) -> dict[str, float]:
        """Return the age of the oldest pending delivery of each target in seconds, 0 for a target without one."""
        t = deliveries_table.c
        pending = sa.func.min(sa.case((t.state == "pending", t.since)))
        now = time.time()
        with self._database.connect() as connection:
            oldest = connection.execute(sa.select(t.target, pending).group_by(t.target))
            return {target: 0.0 if since is None else max(0.0, now - since) for target, since in oldest}

    def find_undelivered(self) -> set[str]:
        """Return the jobs with a pending delivery."""
        t = deliveries_table.c
        with self._database.connect() as connection:
            return set(connection.execute(sa.select(t.job).where(t.state == "pending").distinct()).scalars())

    # ---- send ----

    def claim(self, process: str, target: str | Collection[str]) -> Claim | None:
        """Claim the pending delivery that is due for the longest time, or return None.

        A claim moves the next attempt behind the end of the claim, so that no other process takes the row meanwhile.

        Parameters
        ----------
        process : str
            Name of this process among all that share the database.
        target : str or collection of str
            Claim only deliveries to this target. A collection: only those to none of these targets.
        """
        t = deliveries_table.c
        now = time.time()
        wanted = t.target == target if isinstance(target, str) else t.target.not_in(target)
        due = sa.select(deliveries_table).where(t.state == "pending", t.next_try <= now, wanted)
        token = f"{process}/{secrets.token_hex(8)}"
        with self._database.begin() as connection:
            row = connection.execute(due.order_by(t.next_try, t.job, t.target, t.position).limit(1)).first()
            if row is None:
                return None
            same = (*_is(row.job, row.target, row.result), t.state == "pending", t.next_try == row.next_try)
            values = {"claim": token, "next_try": now + CLAIM_SECONDS}
            claimed = connection.execute(deliveries_table.update().where(*same).values(**values)).rowcount
        return Claim(_to_delivery(row), token) if claimed else None

    def renew(self, claim: Claim) -> bool:
        """Start the seconds of a claim again. Return False if it is no longer the claim of the delivery."""
        return self._update(_held_by(claim), next_try=time.time() + CLAIM_SECONDS)

    def record_sent(self, claim: Claim) -> bool:
        """Record that a result was sent. Return False if a success is recorded or the job was erased.

        The target has the result even if the claim has ended, so a later claim or its failure does not matter.
        """
        delivery = claim.delivery
        unsent = (*_is(delivery.job, delivery.target, delivery.result), deliveries_table.c.state != "sent")
        return self._record(unsent, state="sent", ended=time.time(), code=None)

    def record_failure(self, claim: Claim, code: str, give_up_seconds: float) -> bool:
        """Record a failed attempt, and plan the next one or give the delivery up.

        Return False if it is no longer the claim of the delivery: another process has claimed it or recorded its
        success, or the job was erased.
        """
        now = time.time()
        pause = min(RETRY_SECONDS * 2 ** min(claim.delivery.attempts, MAX_DOUBLINGS), MAX_RETRY_SECONDS)
        if now + pause - claim.delivery.since.timestamp() > give_up_seconds:
            return self._record(_held_by(claim), state="failed", ended=now, code=code)
        return self._record(_held_by(claim), state="pending", next_try=now + pause, code=code)

    def record_refusal(self, claim: Claim, code: str) -> bool:
        """Record a failure that no other attempt can change. For the returned value, see `record_failure`."""
        return self._record(_held_by(claim), state="failed", ended=time.time(), code=code)

    def postpone(self, claim: Claim, seconds: float) -> None:
        """End a claim without an attempt."""
        self._update(_held_by(claim), claim=None, next_try=time.time() + seconds)

    def _record(self, where: Conditions, **values: object) -> bool:
        return self._update(where, claim=None, attempts=deliveries_table.c.attempts + 1, **values)

    def _update(self, where: Conditions, **values: object) -> bool:
        with self._database.begin() as connection:
            return bool(connection.execute(deliveries_table.update().where(*where).values(**values)).rowcount)

    def release_claims(self, prefix: str) -> None:
        """Make the deliveries that dead processes have claimed due at once.

        Parameters
        ----------
        prefix : str
            Start of the names of the dead processes.
        """
        t = deliveries_table.c
        update = deliveries_table.update().where(t.state == "pending", t.claim.startswith(prefix, autoescape=True))
        with self._database.begin() as connection:
            connection.execute(update.values(claim=None, next_try=time.time()))

    # ---- change ----

    def retry(self, job: str) -> int:
        """Make all deliveries of a job that were not sent due at once, and return their number."""
        t = deliveries_table.c
        now = time.time()
        update = deliveries_table.update().where(t.job == job, t.state != "sent", t.claim.is_(None))
        values = {"state": "pending", "since": now, "next_try": now, "ended": None, "attempts": 0}
        with self._database.begin() as connection:
            return connection.execute(update.values(**values)).rowcount

    def erase(self, job: str) -> None:
        """Delete the deliveries of a job. One that is under way records nothing more."""
        with self._database.begin() as connection:
            connection.execute(deliveries_table.delete().where(deliveries_table.c.job == job))


def _is(job: str, target: str, result: str) -> Conditions:
    t = deliveries_table.c
    return t.job == job, t.target == target, t.result == result


def _held_by(claim: Claim) -> Conditions:
    delivery = claim.delivery
    return *_is(delivery.job, delivery.target, delivery.result), deliveries_table.c.claim == claim.token


def _to_delivery(row: sa.Row[tuple[object, ...]]) -> Delivery:
    values = row._mapping
    return Delivery(
        job=values["job"],
        target=values["target"],
        result=values["result"],
        state=cast("DeliveryState", values["state"]),
        attempts=values["attempts"],
        code=values["code"],
        since=datetime.fromtimestamp(values["since"], UTC),
        next_try=datetime.fromtimestamp(values["next_try"], UTC) if values["state"] == "pending" else None,
        ended=datetime.fromtimestamp(values["ended"], UTC) if values["ended"] is not None else None,
    )
