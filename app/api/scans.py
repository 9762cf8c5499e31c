"""/v1/scans: send, list, show, cancel and erase scans."""

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import AwareDatetime

from app.analysis import AnalysisRequest
from app.api.dependencies import (
    JobId,
    Services,
    ServicesDependency,
    refuse_unknown_parameters,
)
from app.api.identity import require
from app.api.problems import problem_of_failed_job, problem_response, problem_responses
from app.api.pull import pull
from app.api.schemas import DeliverySchema, ReviewCounts, ScanDetail, ScanList, ScanSummary
from app.api.upload import REQUEST_BODY, declared_length, is_json
from app.errors import BadRequest, UnknownModel
from app.jobs.job import ENDED_STATES, Cursor, Job, JobFilter, Order, Priority, State
from app.jobs.reviews import Verdict
from app.runtime.selection import check_licence
from app.volume import Geometry

router = APIRouter(prefix="/v1/scans", tags=["scans"])

# Longest time for `Prefer: wait`. Proxies close a request after some minutes.
MAX_WAIT_SECONDS = 300
# Seconds between two checks whether a waiting caller has disconnected.
DISCONNECT_SECONDS = 2.0
RETRY_AFTER_SECONDS = "2"
# The default name of a link is the file name without its suffix. "report" is report.json already.
LINK_NAMES = {"report.dcm": "structured_report", "anomaly.dcm": "parametric_map"}
# For the OpenAPI document.
_TEXT = {"schema": {"type": "string"}}
JOB_HEADERS: dict[str, Any] = {
    "Location": {"description": "Path of the job.", **_TEXT},
    "Preference-Applied": {"description": "`wait=SECONDS`, if the request waited.", **_TEXT},
}
RETRY_HEADER: dict[str, Any] = {"Retry-After": {"description": "Seconds until the next poll.", **_TEXT}}


def analysis_request(
    services: ServicesDependency,
    model: Annotated[str | None, Query(max_length=100, description="Name or id of a model.", examples=["t1"])] = None,
    series: Annotated[
        str | None,
        Query(max_length=70, description="SeriesInstanceUID of the series to analyse; UID/2 for its second stack."),
    ] = None,
    seed: Annotated[int | None, Query(ge=0, lt=2**63, description="Seed of the noise.")] = None,
    geometry: Annotated[
        Geometry, Query(description="Refuse or resample missing, tilted or unevenly spaced slices.")
    ] = "refuse",
) -> AnalysisRequest:
    """Return the parameters of an analysis. An unknown or forbidden model is refused before the upload.

    Raises
    ------
    UnknownModel
        No model has this name or id.
    NonCommercialModel
        The operator does not allow models for non-commercial use.
    """
    manifests = services.engine.manifests
    named = [m for m in manifests if model in {m.name, m.id}]
    for manifest in named:
        check_licence(manifest, noncommercial=services.settings.allow_noncommercial)
    if model is not None and not named:
        known = ", ".join(m.id for m in manifests)
        raise UnknownModel(
            "No model has this name.",
            expected=f"one of {known}." if known else "an installed model, but none is installed.",
            advice="GET /v1/models lists the models. Without ?model=, the scan's modality selects one.",
        )
    return AnalysisRequest(model=model, series=series, seed=seed, geometry=geometry)


@router.post(
    "",
    status_code=202,
    response_model=ScanDetail,
    openapi_extra=REQUEST_BODY,
    dependencies=[Depends(require("send", "send")), Depends(refuse_unknown_parameters)],
    responses={
        200: {"model": ScanDetail, "description": "The finished job, with Prefer: wait", "headers": JOB_HEADERS},
        202: {"description": "The job has not ended", "headers": JOB_HEADERS | RETRY_HEADER},
        **problem_responses(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 500, 502, 503, 507),
    },
)
async def send_scan(
    request: Request,
    services: ServicesDependency,
    parameters: Annotated[AnalysisRequest, Depends(analysis_request)],
    prefer: Annotated[
        str | None, Header(description="`wait=60` waits up to 60 s for the result.", examples=["wait=60"])
    ] = None,
    priority: Annotated[Priority, Query(description="stat jobs start before all routine jobs.")] = "routine",
    idempotency_key: Annotated[
        str | None, Header(max_length=255, description="Name of the job, instead of its content.")
    ] = None,
) -> Response:
    """Send a scan. The same bytes and parameters, or the same Idempotency-Key, return the same job."""
    services.readiness.check()
    missing = services.uploads.missing + declared_length(request)
    await services.calls.query(services.queue.check_capacity, missing)
    with ExitStack() as stack:
        upload = stack.enter_context(services.store.receive_upload())
        settings = services.settings
        if is_json(request):  # names a series at a source
            await pull(request, services, upload)
        else:
            await services.uploads.receive(request, upload, settings.max_upload_mb, settings.max_files)
        files = stack.pop_all()
    arguments = (upload, parameters, idempotency_key, priority)
    job_id = request.state.job = await services.calls.transfer_with(files, services.queue.submit, *arguments)
    seconds = _parse_wait_seconds(prefer)
    if services.follower.full or services.follower.stopping:
        seconds = 0
    job = await _wait_for_job(request, services, job_id, seconds)
    headers = {"Location": scan_path(services, job.id)}
    if seconds:
        headers["Preference-Applied"] = f"wait={seconds}"
    if seconds and job.state == "failed":
        assert job.problem is not None
        return problem_response(problem_of_failed_job(job.problem), headers)
    finished = bool(seconds) and job.state in ENDED_STATES
    if not finished:
        headers["Retry-After"] = RETRY_AFTER_SECONDS
    detail = await services.calls.query(describe_job, services, job)
    return JSONResponse(detail.model_dump(mode="json"), 200 if finished else 202, headers)


def job_filter(
    state: Annotated[list[State] | None, Query(description="Only these states.")] = None,
    priority: Annotated[Priority | None, Query(description="Only this priority.")] = None,
    model: Annotated[
        str | None,
        Query(max_length=100, description="Only this model (name or id); before the end, the requested model."),
    ] = None,
    code: Annotated[str | None, Query(max_length=100, description="Only jobs that failed with this code.")] = None,
    created_after: Annotated[
        AwareDatetime | None, Query(description="Sent at this time or later: ISO 8601 with an offset, + as %2B.")
    ] = None,
    created_before: Annotated[AwareDatetime | None, Query(description="Sent before this time.")] = None,
) -> JobFilter:
    """Return the filter of the list. A job must match all given parameters."""
    return JobFilter(tuple(state or ()), priority, model, code, created_after, created_before)


@router.get(
    "",
    dependencies=[Depends(require("read", "list")), Depends(refuse_unknown_parameters)],
    responses=problem_responses(400, 401, 403, 503),
)
async def list_scans(
    services: ServicesDependency,
    filters: Annotated[JobFilter, Depends(job_filter)],
    limit: Annotated[int, Query(ge=1, le=200, description="Jobs on a page.")] = 50,
    after: Annotated[str | None, Query(description="Start of the page; see `next` of the previous page.")] = None,
    order: Annotated[Order, Query(description="The job that comes first.")] = "newest",
) -> ScanList:
    """List jobs, newest first by default. New jobs do not shift the later pages."""
    # One more than a page: it shows whether another page follows.
    jobs = await services.calls.query(services.queue.list_jobs, filters, limit + 1, _parse_cursor(after), order)
    scans = await services.calls.query(summarise_jobs, services, jobs[:limit])
    return ScanList(scans=scans, next=_next_page(services, jobs, filters, limit, order))


@router.get("/{job}", dependencies=[Depends(require("read", "show"))], responses=problem_responses(401, 403, 404, 503))
async def get_scan(request: Request, services: ServicesDependency, job: JobId) -> ScanDetail:
    """Show a scan: state, stage, progress, queue position, and its findings when it has succeeded."""
    detail = await services.calls.query(lambda: describe_job(services, services.queue.get(job)))
    request.state.phase = detail.state  # a view of the findings does not repeat a view of the waiting job
    return detail


@router.post(
    "/{job}/cancel",
    dependencies=[Depends(require("erase", "cancel"))],
    responses=problem_responses(401, 403, 404, 409, 503),
)
async def cancel_scan(services: ServicesDependency, job: JobId) -> ScanDetail:
    """Cancel a scan that is queued or running. If the same content is sent again, it becomes a new job."""
    await services.calls.query(services.queue.cancel, job)
    return await services.calls.query(lambda: describe_job(services, services.queue.get(job)))


@router.delete(
    "/{job}",
    status_code=204,
    dependencies=[Depends(require("erase", "erase"))],
    responses=problem_responses(401, 403, 404, 503),
)
async def erase_scan(services: ServicesDependency, job: JobId) -> None:
    """Erase a scan with its results and all other traces. A running scan is stopped."""
    await services.calls.transfer(services.queue.erase, job)


def scan_path(services: Services, job: str) -> str:
    """Return the path of a job, with the prefix of the proxy."""
    return f"{services.settings.root_path}/v1/scans/{job}"


def summarise_jobs(services: Services, jobs: Sequence[Job]) -> tuple[ScanSummary, ...]:
    """Return the summaries of jobs, in the same order."""
    positions = services.queue.positions() if any(job.state == "queued" for job in jobs) else {}
    # Only findings have reviews.
    reviewed = [job.id for job in jobs if job.state == "succeeded" and (not job.summary or job.summary.findings_count)]
    reviews = services.queue.reviews.count(reviewed) if reviewed else {}
    return tuple(_summarise(services, job, positions.get(job.id), reviews.get(job.id, {})) for job in jobs)


def describe_job(services: Services, job: Job) -> ScanDetail:
    """Return a job with the findings of its published report."""
    report = services.read_report(job.id) if job.state == "succeeded" else None
    (summary,) = summarise_jobs(services, [job])
    return ScanDetail(
        **dict(summary) | ({"lesion_volume_ml": report.lesion_volume_ml} if report else {}),
        research_use_only=True,
        warnings=report.warnings if report else None,
        findings=report.findings if report else None,
        selection=report.selection if report else None,
        timings=report.seconds if report else None,
        deliveries=tuple(
            DeliverySchema.model_validate(delivery, from_attributes=True)
            for delivery in (services.queue.deliveries.of_job(job.id) if job.is_routed else ())
        ),
    )


def _summarise(services: Services, job: Job, queue_position: int | None, reviews: Mapping[Verdict, int]) -> ScanSummary:
    path = scan_path(services, job.id)
    links = {"self": path, "events": f"{path}/events"}
    if job.state in {"queued", "running"}:
        links["cancel"] = f"{path}/cancel"
    if job.state == "succeeded":
        links["reviews"] = f"{path}/reviews"
        names = {LINK_NAMES.get(name, name.partition(".")[0]): name for name in job.results}
        links |= {link: f"{path}/{name}" for link, name in names.items()}
    return ScanSummary(
        id=job.id,
        state=job.state,
        stage=job.stage,
        progress=job.progress,
        queue_position=queue_position,
        priority=job.priority,
        model=job.model,
        created=job.created,
        started=job.started,
        ended=job.ended,
        problem=problem_of_failed_job(job.problem) if job.problem else None,
        lesion_volume_ml=job.summary and job.summary.lesion_volume_ml,
        findings_count=job.summary and job.summary.findings_count,
        scan_score=job.summary and job.summary.scan_score,
        warnings_count=job.summary and job.summary.warnings_count,
        reviews=ReviewCounts.model_validate(reviews),
        links=links,
    )


def _parse_wait_seconds(prefer: str | None) -> int:
    """Return the seconds of `wait=` in a Prefer header (RFC 7240), 0 if there is none."""
    wait = re.search(r"(?:^|[,;])\s*wait\s*=\s*(\d{1,6})", prefer or "", re.IGNORECASE)
    return min(int(wait[1]), MAX_WAIT_SECONDS) if wait else 0


async def _wait_for_job(request: Request, services: Services, job: str, seconds: int) -> Job:
    """Return the job when it has ended, the time is up, the caller has disconnected, or the process ends."""
    deadline = time.monotonic() + seconds
    if seconds:
        with services.follower.follow(job, waiting=True) as subscription:
            while (remaining := deadline - time.monotonic()) > 0:
                await subscription.next(min(remaining, DISCONNECT_SECONDS))
                ended = subscription.snapshot is not None and subscription.snapshot.ended
                if ended or services.follower.stopping or await request.is_disconnected():
                    break
    return await services.calls.query(services.queue.get, job)


def _parse_cursor(after: str | None) -> Cursor | None:
    if after is None:
        return None
    parts = re.fullmatch(r"(\d{1,17})-([0-9a-f-]{33})", after)
    if not parts:
        raise BadRequest(
            "`after` is not a position in the list.",
            expected="the value from `next` of a page.",
            advice="Start without `after`.",
        )
    return Cursor(datetime.fromtimestamp(int(parts[1]) / 1_000_000, UTC), parts[2])


def _next_page(services: Services, jobs: Sequence[Job], filters: JobFilter, limit: int, order: Order) -> str | None:
    """Return the path of the next page, None on the last page."""
    if len(jobs) <= limit:
        return None
    last = jobs[limit - 1]
    parameters = {
        "state": filters.states,
        "priority": filters.priority,
        "model": filters.model,
        "code": filters.code,
        "created_after": filters.created_after and filters.created_after.isoformat(),
        "created_before": filters.created_before and filters.created_before.isoformat(),
        "order": order if order != "newest" else None,
    }
    query = {"limit": limit, **{name: value for name, value in parameters.items() if value}}
    encoded = urlencode({**query, "after": Cursor(last.created, last.id)}, doseq=True)
    return f"{services.settings.root_path}/v1/scans?{encoded}"
