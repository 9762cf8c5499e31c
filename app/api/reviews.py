"""/v1/scans/{job}/reviews and /v1/reviews: verdicts of readers on findings. They never change a result."""

import csv
import io
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from app.api.dependencies import JobId, Services, ServicesDependency, refuse_unknown_parameters
from app.api.identity import Principal, require
from app.api.json_body import parse_body, read_body
from app.api.problems import problem_responses
from app.api.schemas import Schema
from app.errors import Forbidden, InternalError, NotFinished, NotFound
from app.jobs.reviews import Review, ReviewedFinding, Verdict, select_latest

router = APIRouter(prefix="/v1", tags=["reviews"])

MAX_NOTE = 1000
# The longest actor: "oidc:" and a subject of the issuer.
MAX_READER = 260
# A note of the largest length, with each character escaped.
MAX_BODY_BYTES = 16 << 10
# A spreadsheet takes a cell that begins like this for a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
# PostgreSQL stores no NUL.
_TEXT = r"^[^\x00]*$"
JSON_BEGIN, JSON_END = '{"reviews":[', "]}"
MEDIA_TYPES = {"json": "application/json", "csv": "text/csv"}
COLUMNS = ("job", "model", "code_version", "label", "volume_ml", "peak_score", "verdict", "note", "reader", "time")

Label = Annotated[int, Path(ge=1, lt=2**31, description="`findings[].label` of report.json.")]
Reader = Annotated[
    str | None,
    Query(
        max_length=MAX_READER,
        pattern=_TEXT,
        description="Name of the reader who gave the verdict, by default the actor of the login. "
        "With a login, another reader needs the scope `admin`.",
    ),
]


class NewReview(Schema):
    """Verdict of a reader on a finding."""

    verdict: Verdict
    note: str = Field("", max_length=MAX_NOTE, pattern=_TEXT)
    reader: str = Field(
        "",
        max_length=MAX_READER,
        pattern=_TEXT,
        description="Name of the reader. If it is empty, the actor of the login. "
        "With a login, another reader needs the scope `admin`.",
    )


class FindingReview(NewReview):
    """Recorded verdict of a reader on a finding of a job."""

    label: int
    time: datetime


class ReviewList(Schema):
    """Verdicts on the findings of a job."""

    reviews: tuple[FindingReview, ...] = Field(
        description="The latest verdict of each reader on each finding, the oldest first."
    )
    history: tuple[FindingReview, ...] = Field(description="All verdicts, the oldest first.")


class ExportedReview(FindingReview):
    """Verdict with the finding that it concerns."""

    job: str
    model: str = Field(description="Id of the model, which contains its version.")
    code_version: str = Field(description="Version of Counterpart that analysed the scan.")
    volume_ml: float
    peak_score: float


class ReviewExport(Schema):
    """Verdicts on the findings of all jobs."""

    reviews: tuple[ExportedReview, ...] = Field(description="The latest verdict of each reader on each finding.")


@router.get(
    "/scans/{job}/reviews",
    dependencies=[Depends(require("read", "show"))],
    responses=problem_responses(401, 403, 404, 409, 503),
)
async def list_reviews(services: ServicesDependency, job: JobId) -> ReviewList:
    """List the verdicts of readers on the findings of a scan."""
    history = await services.calls.query(_read_history, services, job)
    return ReviewList(reviews=_describe(select_latest(history)), history=_describe(history))


@router.put(
    "/scans/{job}/reviews/{label}",
    dependencies=[Depends(require("read", "review"))],
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": NewReview.model_json_schema()}}}
    },
    responses=problem_responses(400, 401, 403, 404, 408, 409, 413, 503),
)
async def put_review(request: Request, services: ServicesDependency, job: JobId, label: Label) -> FindingReview:
    """Record the verdict of a reader on a finding. The latest verdict of a reader counts, and the history is kept."""
    new = parse_body(NewReview, await read_body(request, MAX_BODY_BYTES))
    reader = new.reader or _default_reader(request)
    _check_reader(request, reader)
    finding = await services.calls.transfer(_find, services, job, label)
    review = await services.calls.query(services.queue.reviews.put, finding, new.verdict, new.note, reader)
    return _describe([review])[0]


@router.delete(
    "/scans/{job}/reviews/{label}",
    status_code=204,
    dependencies=[Depends(require("read", "review")), Depends(refuse_unknown_parameters)],
    responses=problem_responses(400, 401, 403, 404, 409, 503),
)
async def remove_review(
    request: Request, services: ServicesDependency, job: JobId, label: Label, reader: Reader = None
) -> None:
    """Remove the verdict of a reader on a finding, with its history."""
    name = _default_reader(request) if reader is None else reader
    _check_reader(request, name)
    await services.calls.transfer(_find, services, job, label)
    await services.calls.query(services.queue.reviews.remove, job, label, name)


@router.get(
    "/reviews",
    response_model=ReviewExport,
    dependencies=[Depends(require("read", "list")), Depends(refuse_unknown_parameters)],
    responses={
        200: {"content": {"text/csv": {"schema": {"type": "string"}}}},
        **problem_responses(400, 401, 403, 503),
    },
)
async def export_reviews(
    services: ServicesDependency,
    format: Annotated[  # noqa: A002  # the name of the parameter
        Literal["json", "csv"], Query(description="Format of the answer.")
    ] = "json",
) -> Response:
    """Return the verdicts on the findings of all scans, for calibration and audits."""
    pages = services.queue.reviews.read_latest()
    first = await services.calls.query(_next_page, pages)  # a fault of the database is 503, not half a response
    write = write_csv if format == "csv" else write_json

    async def body() -> AsyncIterator[str]:
        yield write(map(_export, first), begin=True)
        while page := await services.calls.query(_next_page, pages):
            yield write(map(_export, page), begin=False)
        if format == "json":
            yield JSON_END

    headers = {"Cache-Control": "no-store"}
    if format == "csv":
        headers["Content-Disposition"] = 'attachment; filename="reviews.csv"'
    return StreamingResponse(body(), headers=headers, media_type=MEDIA_TYPES[format])


def _next_page(pages: Iterator[Sequence[Review]]) -> Sequence[Review]:
    return next(pages, ())


def write_json(reviews: Iterable[ExportedReview], *, begin: bool) -> str:
    """Return a page of the JSON object `ReviewExport`, which `JSON_END` completes."""
    text = ",".join(review.model_dump_json() for review in reviews)
    return f"{JSON_BEGIN if begin else ','}{text}"


def write_csv(reviews: Iterable[ExportedReview], *, begin: bool) -> str:
    """Return a page of CSV (RFC 4180), the first one with a header. No cell is a formula of a spreadsheet."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    if begin:
        writer.writerow(COLUMNS)
    for review in reviews:
        document = review.model_dump(mode="json")
        writer.writerow([_as_text(document[column]) for column in COLUMNS])
    return file.getvalue()


def _as_text(value: object) -> str:
    text = str(value)
    return f"'{text}" if isinstance(value, str) and text.startswith(FORMULA_STARTS) else text


def _default_reader(request: Request) -> str:
    """Return the actor of the login, "" without access control."""
    principal: Principal = request.state.principal
    return "" if principal.source == "none" else principal.actor


def _check_reader(request: Request, reader: str) -> None:
    """Refuse a verdict in the name of another reader, unless the caller has the scope `admin`.

    Raises
    ------
    Forbidden
    """
    principal: Principal = request.state.principal
    # Without access control, the name is what the caller states.
    if principal.source == "none" or reader == principal.actor or "admin" in principal.scopes:
        return
    raise Forbidden(
        "The verdict would be changed in the name of another reader.",
        expected="the actor of the login as `reader`, or a token with the scope `admin`.",
        advice="Leave out `reader`. Ask the operator to change the verdicts of other readers.",
    )


def _read_history(services: Services, job: str) -> Sequence[Review]:
    _check_succeeded(services, job)
    return services.queue.reviews.history(job)


def _check_succeeded(services: Services, job: str) -> None:
    state = services.queue.get(job).state
    if state != "succeeded":
        raise NotFinished(
            f"The job is {state}.",
            expected="a job that has succeeded.",
            advice="Wait until the job has succeeded. Only its findings can be reviewed.",
        )


def _find(services: Services, job: str, label: int) -> ReviewedFinding:
    """Return a finding of a job from its report.

    Raises
    ------
    NotFound, NotFinished, InternalError
    """
    _check_succeeded(services, job)
    report = services.read_report(job)
    if report is None:
        raise InternalError(
            "report.json of a succeeded job is missing in the store.",
            expected="the results of the job.",
            advice="Check the store. DELETE the job and send the scan again.",
        )
    for finding in report.findings:
        if finding.label == label:
            return ReviewedFinding(job, label, report.model, report.code_version, finding.volume_ml, finding.peak_score)
    raise NotFound(
        "No finding of this job has this label.",
        expected=f"1 to {len(report.findings)}." if report.findings else "a job with findings.",
        advice="findings[].label of report.json lists the labels.",
    )


def _describe(reviews: Sequence[Review]) -> tuple[FindingReview, ...]:
    return tuple(
        FindingReview(label=r.finding.label, verdict=r.verdict, note=r.note, reader=r.reader, time=r.time)
        for r in reviews
    )


def _export(review: Review) -> ExportedReview:
    (described,) = _describe([review])
    finding = review.finding
    return ExportedReview(
        **dict(described),
        job=finding.job,
        model=finding.model,
        code_version=finding.code_version,
        volume_ml=finding.volume_ml,
        peak_score=finding.peak_score,
    )
