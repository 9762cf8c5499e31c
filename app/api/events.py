"""/v1/scans/{job}/events: the progress of a job as server-sent events."""

import asyncio
from collections.abc import AsyncIterator

from fastapi import APIRouter, Depends
from fastapi.responses import StreamingResponse

from app.api.dependencies import JobId, ServicesDependency
from app.api.follower import STREAM_POLL_SECONDS, Event, JobFollower
from app.api.identity import require
from app.api.problems import problem_responses

router = APIRouter(prefix="/v1/scans", tags=["scans"], dependencies=[Depends(require("read", "follow"))])

# Proxies close a connection without traffic after about a minute.
KEEP_ALIVE_SECONDS = 15.0
# For the OpenAPI document.
_TEXT = {"schema": {"type": "string"}}


async def stream_events(follower: JobFollower, job: str) -> AsyncIterator[str]:
    """Yield the events of a job until it ends, in the format of the HTML standard (section 9.2)."""
    last: Event | None = None
    with follower.follow(job) as subscription:
        yield "retry: 2000\n\n"
        while not follower.stopping:
            if not await subscription.next(KEEP_ALIVE_SECONDS):
                yield ": keep-alive\n\n"
                continue
            snapshot = subscription.snapshot
            if snapshot is None:
                continue
            event = snapshot.event
            # The estimate changes at every poll, so its change alone does not cause an event.
            if not last or not event or event != last.model_copy(update={"seconds_left": event.seconds_left}):
                last = event
                yield snapshot.text
            if snapshot.ended:
                return
            # A waiting caller makes the polls more frequent.
            await asyncio.sleep(STREAM_POLL_SECONDS / 2)


@router.get(
    "/{job}/events",
    response_class=StreamingResponse,
    responses={
        200: {"description": "Events `progress`, then `end`", "content": {"text/event-stream": _TEXT}},
        **problem_responses(401, 403, 404, 503),
    },
)
async def follow_scan(services: ServicesDependency, job: JobId) -> StreamingResponse:
    """Stream the progress of a job: state, stage, percent, queue position and seconds left, at each change."""
    found = await services.calls.query(services.queue.get, job)
    services.follower.check_limit()
    # A proxy that buffers responses would delay the events.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        stream_events(services.follower, found.id), media_type="text/event-stream", headers=headers
    )
