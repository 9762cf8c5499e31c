"""GET /v1/scans/{id}/events: what happens to a job, as server-sent events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from app.api.scans import JobId, problems
from app.api.schemas import Event
from app.api.service import Of, Service, authorise
from app.errors import NotFound
from app.jobs.job import ENDED_STATES, Job

router = APIRouter(prefix="/v1/scans", tags=["scans"], dependencies=[Depends(authorise)])

# Between two looks at the job.
LOOK_SECONDS = 0.5
# Proxies close a connection that is silent for a minute.
SILENCE_SECONDS = 15.0
# Share of a job below which what is left of it cannot be told.
TELLING = 0.1


def event_of(job: Job, place: int | None, now: datetime) -> Event:
    """What is told of a job."""
    left = None
    if job.state == "running" and job.started and job.progress > TELLING:
        left = round((now - job.started).total_seconds() * (1 - job.progress) / job.progress, 1)
    percent = round(100 * job.progress, 1)
    return Event(state=job.state, stage=job.stage, percent=percent, place=place, seconds_left=left)


async def stream(request: Request, service: Service, job: Job) -> AsyncIterator[str]:
    """Events in the form of the standard (HTML, 9.2), from now to the end of the job."""
    told: Event | None = None
    spoken = time.monotonic()
    yield "retry: 2000\n\n"
    while not await request.is_disconnected():
        place = (await run_in_threadpool(service.queue.positions)).get(job.id) if job.state == "queued" else None
        event = event_of(job, place, datetime.now(UTC))
        if told is None or event != told.model_copy(update={"seconds_left": event.seconds_left}):
            told, spoken = event, time.monotonic()
            yield f"event: {'end' if job.state in ENDED_STATES else 'progress'}\ndata: {event.model_dump_json()}\n\n"
        elif time.monotonic() - spoken > SILENCE_SECONDS:
            spoken = time.monotonic()
            yield ": still there\n\n"
        if job.state in ENDED_STATES:
            return
        await asyncio.sleep(LOOK_SECONDS)
        try:
            job = await run_in_threadpool(service.queue.get, job.id)
        except NotFound:
            yield f"event: end\ndata: {json.dumps({'state': 'erased'})}\n\n"
            return


@router.get(
    "/{job}/events",
    response_class=StreamingResponse,
    responses={
        200: {"description": "Events `progress`, then `end`", "content": {"text/event-stream": {}}},
        **problems(401, 404),
    },
)
async def follow_scan(request: Request, service: Of, job: JobId) -> StreamingResponse:
    """Follow a scan: state, stage, percent, place in the queue, seconds left, each as soon as it changes."""
    found = await run_in_threadpool(service.queue.get, job)
    # A proxy that collects answers would hold the events back.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream(request, service, found), media_type="text/event-stream", headers=headers)
