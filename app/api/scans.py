"""/v1/scans: send a scan, follow it, fetch its results, stop it, erase it."""

import asyncio
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse
from pydantic import AwareDatetime

from app.analysis import AnalysisRequest as Wanted
from app.api import views
from app.api.problems import MEDIA_TYPE, absent_problem, job_problem, problem_response
from app.api.receive import declared, receive
from app.api.results import MEDIA_TYPES, ResultFile
from app.api.schemas import Scan, ScanList
from app.api.service import Of, Service, authorise
from app.errors import BadRequest, InternalError, NoSuchResult, NotFinished, UnknownModel
from app.export.outputs import OPTIONAL_NAMES, REQUIRED_NAMES
from app.jobs.job import ENDED, Cursor, Job, Priority, State, Which
from app.runtime.choice import permit
from app.volume import Geometry

router = APIRouter(prefix="/v1/scans", tags=["scans"], dependencies=[Depends(authorise)])

# Longest that a request is held for its result: proxies give up after some minutes.
MOST_WAIT_SECONDS = 300
# Between two looks at a job that is waited for.
LOOK_SECONDS = 0.15
RETRY_SECONDS = "2"

JobId = Annotated[str, Path(description="The job's id.", examples=["0f3a9c51b2d4e678-5e1b7a90c3d2f468"])]
ResultName = Literal[
    "mask.nii.gz",
    "anomaly.nii.gz",
    "counterpart.nii.gz",
    "report.json",
    "preview.png",
    "brain.nii.gz",
    "segmentation.dcm",
    "report.dcm",
]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems of a route, for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": "Problem", "content": content} for status in statuses}


BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM = {
    "schema": {
        "type": "object",
        "required": ["file"],
        "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
    }
}
UPLOAD = {
    "requestBody": {
        "required": True,
        "description": "A NIfTI or MGH file, a zip of a DICOM series, or many files in a form or as DICOMweb does.",
        "content": {
            "application/octet-stream": BINARY,
            "application/gzip": BINARY,
            "multipart/form-data": FORM,
            "multipart/related": BINARY,
        },
    }
}


def _wanted(
    service: Of,
    model: Annotated[str | None, Query(max_length=100, description="A bundle's name or id.", examples=["t1"])] = None,
    series: Annotated[
        str | None, Query(max_length=70, description="SeriesInstanceUID, of several; UID/2 for its second stack.")
    ] = None,
    seed: Annotated[int | None, Query(ge=0, lt=2**63, description="Of the keyed noise.")] = None,
    geometry: Annotated[
        Geometry, Query(description="What to do with slices that are missing, tilted or unevenly spaced.")
    ] = "refuse",
) -> Wanted:
    """What the query asks for; a model that there is not is refused before the upload."""
    manifests = service.engine.manifests
    named = [m for m in manifests if model in {m.name, m.id}]
    for manifest in named:
        permit(manifest, noncommercial=service.settings.allow_noncommercial)
    if model is not None and not named:
        raise UnknownModel(
            "No model has this name.",
            expected="one of " + (", ".join(m.id for m in manifests) or "no model: none is installed") + ".",
            advice="GET /v1/models lists them; leave ?model= out to let the scan's modality choose.",
        )
    return Wanted(model=model, series=series, seed=seed, geometry=geometry)


@router.post(
    "",
    status_code=202,
    response_model=Scan,
    openapi_extra=UPLOAD,
    responses={
        200: {"model": Scan, "description": "With Prefer: wait, the finished job"},
        **problems(400, 401, 403, 409, 413, 415, 422, 429, 500, 503, 507),
    },
)
async def send_scan(
    request: Request,
    service: Of,
    wanted: Annotated[Wanted, Depends(_wanted)],
    prefer: Annotated[str | None, Header(description="`wait=60` waits for the result.", examples=["wait=60"])] = None,
    priority: Annotated[Priority, Query(description="stat goes before all that is routine.")] = "routine",
    idempotency_key: Annotated[str | None, Header(max_length=255, description="Names the job.")] = None,
) -> Response:
    """Send a scan. The same bytes, model and parameters, or the same Idempotency-Key, give the same job."""
    service.readiness.check()
    await run_in_threadpool(service.jobs.check_room, declared(request))
    with service.store.receive() as incoming:
        await receive(request, incoming, service.settings.max_upload_mb, service.settings.max_files)
        id_ = await run_in_threadpool(service.jobs.submit, incoming, wanted, idempotency_key, priority)
    seconds = _wait_seconds(prefer)
    job = await _wait(request, service, id_, seconds)
    headers = {"Location": views.path_of(job.id)}
    if seconds:
        headers["Preference-Applied"] = f"wait={seconds}"
    if seconds and job.state == "failed":
        assert job.problem is not None
        return problem_response(job_problem(job.problem), headers)
    finished = bool(seconds) and job.state in ENDED
    if not finished:
        headers["Retry-After"] = RETRY_SECONDS
    scan = await run_in_threadpool(views.scan, service, job)
    return JSONResponse(scan.model_dump(mode="json"), 200 if finished else 202, headers)


def _which(
    state: Annotated[list[State] | None, Query(description="Only these states.")] = None,
    priority: Annotated[Priority | None, Query(description="Only this priority.")] = None,
    model: Annotated[
        str | None, Query(max_length=100, description="Analysed with this model (name or id); else asked for it.")
    ] = None,
    code: Annotated[str | None, Query(max_length=100, description="Failed with a problem of this code.")] = None,
    created_after: Annotated[
        AwareDatetime | None, Query(description="Sent then or later: ISO 8601 with its offset, + written %2B.")
    ] = None,
    created_before: Annotated[AwareDatetime | None, Query(description="Sent before then.")] = None,
) -> Which:
    """Which jobs of the list; all that is given must hold."""
    return Which(tuple(state or ()), priority, model, code, created_after, created_before)


@router.get("", responses=problems(400, 401))
def list_scans(
    service: Of,
    which: Annotated[Which, Depends(_which)],
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[str | None, Query(description="From `next` of the page before.")] = None,
) -> ScanList:
    """List jobs, newest first. New jobs do not shift the pages that follow."""
    jobs = service.jobs.page(which, limit + 1, _cursor(after))
    return ScanList(scans=views.summaries(service, jobs[:limit]), next=_next(jobs, which, limit))


@router.get("/{job}", responses=problems(401, 404))
def get_scan(service: Of, job: JobId) -> Scan:
    """Follow a scan: state, stage, progress, place in the queue, and in the end its findings."""
    return views.scan(service, service.jobs.get(job))


@router.post("/{job}/cancel", responses=problems(401, 404, 409))
def cancel_scan(service: Of, job: JobId) -> Scan:
    """Stop a scan, between two network evaluations. It never answers for the same content again."""
    service.jobs.cancel(job)
    return views.scan(service, service.jobs.get(job))


@router.delete("/{job}", status_code=204, responses=problems(401, 404))
def erase_scan(service: Of, job: JobId) -> None:
    """Erase a scan with its results and every trace; a running one is stopped."""
    service.jobs.erase(job)


@router.head("/{job}/{name}", include_in_schema=False)
@router.get(
    "/{job}/{name}",
    response_class=FileResponse,
    responses={
        200: {"content": dict.fromkeys(MEDIA_TYPES.values(), BINARY), "description": "The file"},
        206: {"content": dict.fromkeys(MEDIA_TYPES.values(), BINARY), "description": "The Range of it"},
        304: {"description": "It is what If-None-Match names"},
        **problems(400, 401, 404, 409, 416, 422, 500, 503),
    },
)
def get_result(
    service: Of, job: JobId, name: ResultName, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """Fetch a result on the scan's own grid. HEAD, ETag and Range work; 409 until it is there.

    `brain.nii.gz` belongs to a head that a brain was taken out of, the DICOM results to a scan that came as
    DICOM; where there is none, 404 says why.
    """
    found = service.jobs.get(job)
    if found.state == "failed":
        assert found.problem is not None
        return problem_response(job_problem(found.problem))
    if found.state != "succeeded":
        again = "Send the scan again." if found.state == "cancelled" else "Follow the job, then ask again."
        raise NotFinished(f"The job is {found.state}.", expected="a job that succeeded.", advice=again)
    # A job's results never change once they are published.
    headers = {"ETag": f'"{found.id}"', "Cache-Control": "private, no-cache"}
    if if_none_match and headers["ETag"] in re.split(r"\s*,\s*(?:W/)?", if_none_match.removeprefix("W/")):
        return Response(status_code=304, headers=headers)
    fetched = service.store.fetch(found.id, name)
    if fetched is None and (reason := views.why_absent(service, found, name)):
        return problem_response(absent_problem(reason))
    if fetched is None and name not in found.results:
        raise NoSuchResult(
            f"The scan was analysed by a version that wrote no {name}.",
            expected=", ".join(found.results) + ".",
            advice="DELETE the job and send the scan again.",
        )
    if fetched is None:
        raise InternalError(
            f"{name} of a finished job is missing.",
            expected=", ".join((*REQUIRED_NAMES, *OPTIONAL_NAMES)) + ".",
            advice="Check the store; DELETE the job and send the scan again.",
        )
    return ResultFile(fetched, name, headers)


def _wait_seconds(prefer: str | None) -> int:
    wait = re.search(r"(?:^|[,;])\s*wait\s*=\s*(\d{1,6})", prefer or "", re.IGNORECASE)
    return min(int(wait[1]), MOST_WAIT_SECONDS) if wait else 0


async def _wait(request: Request, service: Service, id_: str, seconds: int) -> Job:
    deadline = time.monotonic() + seconds
    while True:
        job = await run_in_threadpool(service.jobs.get, id_)
        if job.state in ENDED or time.monotonic() >= deadline or await request.is_disconnected():
            return job
        await asyncio.sleep(LOOK_SECONDS)


def _cursor(after: str | None) -> Cursor | None:
    if after is None:
        return None
    parts = re.fullmatch(r"(\d{1,17})-([0-9a-f-]{33})", after)
    if not parts:
        raise BadRequest("`after` is no place in the list.", expected="`next` of a page.", advice="Start without it.")
    return Cursor(datetime.fromtimestamp(int(parts[1]) / 1_000_000, UTC), parts[2])


def _next(jobs: Sequence[Job], which: Which, limit: int) -> str | None:
    if len(jobs) <= limit:
        return None
    last = jobs[limit - 1]
    asked = {
        "state": which.states,
        "priority": which.priority,
        "model": which.model,
        "code": which.code,
        "created_after": which.created_after and which.created_after.isoformat(),
        "created_before": which.created_before and which.created_before.isoformat(),
    }
    query = {"limit": limit, **{name: value for name, value in asked.items() if value}}
    return f"/v1/scans?{urlencode({**query, 'after': Cursor(last.created, last.id)}, doseq=True)}"
