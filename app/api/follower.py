"""Followers of jobs: event streams and waiting callers. One task of the process polls the database for all of them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial

import structlog
from pydantic import BaseModel, ConfigDict, Field

from app.errors import TooManyStreams, error_location
from app.jobs.job import ENDED_STATES, Job, State
from app.jobs.queue import JobQueue

# Seconds between two polls for event streams, and if a caller waits for the end of a job.
STREAM_POLL_SECONDS = 0.5
WAIT_POLL_SECONDS = 0.15

QUEUE_POSITION = "Position in the queue, 1 for the next job; null unless queued."
# Seconds between two polls at least, if followers arrive in the meantime.
MIN_POLL_SECONDS = 0.05
# Fraction of a job that must be done before the remaining time is estimated.
MIN_PROGRESS_FOR_ESTIMATE = 0.1

# Raw states, queue positions and changed jobs, by id.
Reading = tuple[dict[str, object], dict[str, int], dict[str, Job]]

log = structlog.get_logger("counterpart.http")


class Event(BaseModel):
    """Data of a server-sent event."""

    model_config = ConfigDict(frozen=True)

    state: State
    stage: str | None
    percent: float = Field(ge=0, le=100)
    queue_position: int | None = Field(description=QUEUE_POSITION)
    seconds_left: float | None = Field(description="Estimate from the speed so far; null if it is not known.")


def create_event(job: Job, queue_position: int | None, now: datetime) -> Event:
    """Return the event that describes the state of a job at a time."""
    seconds_left = None
    if job.state == "running" and job.started and job.progress > MIN_PROGRESS_FOR_ESTIMATE:
        elapsed = (now - job.started).total_seconds()
        seconds_left = round(elapsed * (1 - job.progress) / job.progress, 1)
    return Event(
        state=job.state,
        stage=job.stage,
        percent=round(100 * job.progress, 1),
        queue_position=queue_position,
        seconds_left=seconds_left,
    )


@dataclass(frozen=True)
class Snapshot:
    """State of a job at one poll, shared by all its followers.

    Attributes
    ----------
    job : Job or None
        None if the job was erased.
    queue_position : int or None
    time : datetime
    """

    job: Job | None
    queue_position: int | None
    time: datetime

    @property
    def ended(self) -> bool:
        """Return whether no further state will follow."""
        return self.job is None or self.job.state in ENDED_STATES

    @cached_property
    def event(self) -> Event | None:
        """Event of the job, None if it was erased."""
        return create_event(self.job, self.queue_position, self.time) if self.job else None

    @cached_property
    def text(self) -> str:
        """The event in the format of the HTML standard (section 9.2)."""
        data = self.event.model_dump_json() if self.event else '{"state": "erased"}'
        return f"event: {'end' if self.ended else 'progress'}\ndata: {data}\n\n"


class Subscription:
    """One follower of one job.

    Attributes
    ----------
    job : str
    waiting : bool
        The follower wants the end of the job as soon as possible.
    snapshot : Snapshot or None
        Last state; None before the first poll.
    """

    def __init__(self, job: str, *, waiting: bool) -> None:
        self.job = job
        self.waiting = waiting
        self.snapshot: Snapshot | None = None
        self._changed = asyncio.Event()

    def update(self, snapshot: Snapshot | None) -> None:
        """Set the state, or only wake the follower if it is None."""
        self.snapshot = snapshot or self.snapshot
        self._changed.set()

    async def next(self, seconds: float) -> bool:
        """Wait for a change. Return False after the given time without one."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True


class JobFollower:
    """The followers of all jobs in this process.

    Parameters
    ----------
    queue : JobQueue
    query : callable
        Runs a blocking call that reads the database (`app.api.dependencies.Calls.query`).
    limit : int
        Largest number of followers.
    """

    def __init__(
        self, queue: JobQueue, query: Callable[[Callable[[], Reading]], Awaitable[Reading]], limit: int
    ) -> None:
        self._queue = queue
        self._query = query
        self._limit = limit
        self._subscriptions: set[Subscription] = set()
        self._states: dict[str, object] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._task: asyncio.Task[None] | None = None
        self._arrived = asyncio.Event()
        self.stopping = False

    @property
    def full(self) -> bool:
        """Return whether no further follower is accepted."""
        return len(self._subscriptions) >= self._limit

    def check_limit(self) -> None:
        """Refuse a further event stream.

        Raises
        ------
        TooManyStreams
        """
        if self.full:
            raise TooManyStreams(
                f"{len(self._subscriptions)} callers follow jobs at the moment.",
                expected=f"fewer than {self._limit} event streams and waiting callers.",
                advice="Try again later (see Retry-After), or poll the job. "
                "The operator can raise COUNTERPART_MAX_STREAMS.",
            )

    @contextmanager
    def follow(self, job: str, *, waiting: bool = False) -> Iterator[Subscription]:
        """Yield a subscription to the changes of a job."""
        subscription = Subscription(job, waiting=waiting)
        if (snapshot := self._snapshots.get(job)) is not None:
            subscription.update(snapshot)
        self._subscriptions.add(subscription)
        self._arrived.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._poll_repeatedly())
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def stop(self) -> None:
        """Wake all followers, because the process ends. They see `stopping`."""
        self.stopping = True
        for subscription in self._subscriptions:
            subscription.update(None)

    async def _poll_repeatedly(self) -> None:
        while self._subscriptions:
            start = time.monotonic()
            self._arrived.clear()
            try:
                await self._poll()
            except Exception as error:  # noqa: BLE001  # the database may answer at the next poll
                log.warning("poll failed", **error_location(error))
            urgent = any(s.waiting for s in self._subscriptions)
            pause = WAIT_POLL_SECONDS if urgent else STREAM_POLL_SECONDS
            # At least as long as the poll took, so that a slow database is not polled without a break.
            await asyncio.sleep(max(MIN_POLL_SECONDS, time.monotonic() - start))
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._arrived.wait()
        self._states.clear()
        self._snapshots.clear()

    async def _poll(self) -> None:
        followed = {subscription.job for subscription in self._subscriptions}
        states, positions, jobs = await self._query(partial(self._read, followed, dict(self._states)))
        now = datetime.now(UTC)
        for job in followed:
            old = self._snapshots.get(job)
            if old and states.get(job) == self._states.get(job) and positions.get(job) == old.queue_position:
                continue
            self._snapshots[job] = Snapshot(jobs.get(job), positions.get(job), now)
        for job in self._snapshots.keys() - followed:
            del self._snapshots[job]
        self._states = states
        for subscription in self._subscriptions:
            snapshot = self._snapshots.get(subscription.job)
            if snapshot is not None and snapshot is not subscription.snapshot:
                subscription.update(snapshot)

    def _read(self, followed: set[str], known: Mapping[str, object]) -> Reading:
        """Return the raw states, the queue positions, and the jobs whose state or position may have changed."""
        states = self._queue.read_states(followed)
        queued = {job for job, state in states.items() if state.queued}
        changed = [job for job, state in states.items() if state != known.get(job) or job in queued]
        positions = self._queue.positions() if queued else {}
        return dict(states), {job: positions[job] for job in queued & positions.keys()}, self._queue.find(changed)
