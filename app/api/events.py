"""/v1/scans/{job}/events: the progress of a job as server-sent events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from app.api.dependencies import JobId, Services, ServicesDependency, require_token
from app.api.problems import problem_responses
from app.api.schemas import Event
from app.errors import NotFound
from app.jobs.job import ENDED_STATES, Job

router = APIRouter(prefix="/v1/scans", tags=["scans"], dependencies=[Depends(require_token)])

POLL_SECONDS = 0.5
# Proxies close a connection without traffic after about a minute.
KEEP_ALIVE_SECONDS = 15.0
# Fraction of a job that must be done before the remaining time is estimated.
MIN_PROGRESS_FOR_ESTIMATE = 0.1


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


async def stream_events(request: Request, services: Services, job: Job) -> AsyncIterator[str]:
    """Yield the events of a job until it ends, in the format of the HTML standard (section 9.2)."""
    last: Event | None = None
    last_sent = time.monotonic()
    yield "retry: 2000\n\n"
    while not await request.is_disconnected():
        positions = await run_in_threadpool(services.queue.positions) if job.state == "queued" else {}
        event = create_event(job, positions.get(job.id), datetime.now(UTC))
        # The estimate alone changes at every poll: it is no reason for an event.
        if last is None or event != last.model_copy(update={"seconds_left": event.seconds_left}):
            last, last_sent = event, time.monotonic()
            yield f"event: {'end' if job.state in ENDED_STATES else 'progress'}\ndata: {event.model_dump_json()}\n\n"
        elif time.monotonic() - last_sent > KEEP_ALIVE_SECONDS:
            last_sent = time.monotonic()
            yield ": keep-alive\n\n"
        if job.state in ENDED_STATES:
            return
        await asyncio.sleep(POLL_SECONDS)
        try:
            job = await run_in_threadpool(services.queue.get, job.id)
        except NotFound:
            yield f"event: end\ndata: {json.dumps({'state': 'erased'})}\n\n"
            return


@router.get(
    "/{job}/events",
    response_class=StreamingResponse,
    responses={
        200: {"description": "Events `progress`, then `end`", "content": {"text/event-stream": {}}},
        **problem_responses(401, 404),
    },
)
async def follow_scan(request: Request, services: ServicesDependency, job: JobId) -> StreamingResponse:
    """Stream the progress of a job: state, stage, percent, queue position and seconds left, at each change."""
    found = await run_in_threadpool(services.queue.get, job)
    # A proxy that buffers responses would delay the events.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream_events(request, services, found), media_type="text/event-stream", headers=headers)
