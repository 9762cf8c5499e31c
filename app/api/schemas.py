"""JSON schemas of the API, and the functions that build them from a job."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from app.api.dependencies import Services
from app.api.follower import QUEUE_POSITION
from app.api.problems import Problem, problem_of_failed_job, problem_of_missing_result
from app.export.report import Finding, ModelSelectionReport, ReportSummary, read_report_summary
from app.jobs.job import Job, Priority, State
from app.jobs.reviews import Verdict
from app.manifest import Manifest

# The default name of a link is the file name without its suffix. "report" is report.json already.
LINK_NAMES = {"report.dcm": "structured_report"}


class Schema(BaseModel):
    """Base class of the schemas."""

    model_config = ConfigDict(frozen=True)


class ReviewCounts(Schema):
    """Number of readers' verdicts of each kind on the findings of a job."""

    right: int = 0
    wrong: int = 0
    unsure: int = 0


class ScanSummary(Schema):
    """A job in a list."""

    id: str
    state: State
    stage: str | None = Field(description="read, infer or export; null unless running.")
    progress: float = Field(ge=0, le=1, description="Fraction of the job that is done.")
    queue_position: int | None = Field(description=QUEUE_POSITION)
    priority: Priority = Field(description="stat jobs start before all routine jobs.")
    model: str | None = Field(description="Id of the model that was used; before that, the requested model.")
    created: datetime
    started: datetime | None
    ended: datetime | None
    problem: Problem | None = Field(description="Cause of the failure; null unless failed.")
    lesion_volume_ml: float | None = Field(description="Volume of the mask; null unless succeeded.")
    findings_count: int | None = Field(
        description="Number of findings. This and the two fields below are null unless succeeded, and in the list "
        "for a job of a version that did not record them."
    )
    scan_score: float | None = Field(description="`scores.scan` of report.json.")
    warnings_count: int | None = Field(description="Number of `warnings` of report.json.")
    reviews: ReviewCounts = Field(description="Readers' verdicts on the findings.")
    links: dict[str, str] = Field(description="Paths of the job, its actions and its results.")


class ScanDetail(ScanSummary):
    """A job with its findings. Positions are in RAS+ millimetres."""

    research_use_only: bool = Field(True, description="Not a medical device. Not for diagnosis.")
    findings: tuple[Finding, ...] | None = Field(description="Connected lesions; null unless succeeded.")
    selection: ModelSelectionReport | None = Field(
        description="The rule that selected the model, and whether the scan surely fits; null unless succeeded."
    )
    timings: dict[str, float] | None = Field(description="Seconds of each stage; null unless succeeded.")


class ScanList(Schema):
    """A page of jobs."""

    scans: tuple[ScanSummary, ...] = Field(description="Newest first, unless `order` is `oldest`.")
    next: str | None = Field(description="Path of the next page; null on the last page.")


class Model(Schema):
    """An installed model in a list."""

    id: str = Field(description="Value for ?model=. The name alone selects the newest version.")
    name: str
    version: str
    title: str
    intended_use: str
    modality: str
    sequence: str
    licence: str
    link: str


class ModelList(Schema):
    """The installed models."""

    models: tuple[Model, ...]


class ModelCard(Schema):
    """A model's manifest and card."""

    manifest: Manifest
    card: str | None = Field(description="Model card in Markdown; null if the bundle has no card.")


class Health(Schema):
    """State of the process."""

    status: str


class ReadyHealth(Health):
    """State of a process that is ready."""

    provider: str = Field(description="Execution provider of the networks.")
    models: tuple[str, ...] = Field(description="Ids of the models. A process with a worker has tested each one.")
    workers: int = Field(ge=0, description="Running workers in all processes.")


def scan_path(services: Services, job: str) -> str:
    """Return the path of a job, with the prefix of the proxy."""
    return f"{services.settings.root_path}/v1/scans/{job}"


def summarise_jobs(services: Services, jobs: Sequence[Job]) -> tuple[ScanSummary, ...]:
    """Return the summaries of jobs, in the same order."""
    positions = services.queue.positions() if any(job.state == "queued" for job in jobs) else {}
    succeeded = [job.id for job in jobs if job.state == "succeeded"]
    reviews = services.queue.reviews.count(succeeded) if succeeded else {}
    return tuple(_summarise(services, job, positions.get(job.id), reviews.get(job.id, {})) for job in jobs)


def describe_job(services: Services, job: Job) -> ScanDetail:
    """Return a job with the findings of its published report."""
    report = _read_report(services, job) if job.state == "succeeded" else None
    (summary,) = summarise_jobs(services, [job])
    return ScanDetail(
        **dict(summary) | ({"lesion_volume_ml": report.lesion_volume_ml} if report else {}),
        research_use_only=True,
        findings=report.findings if report else None,
        selection=report.selection if report else None,
        timings=report.seconds if report else None,
    )


def find_reason_absent(services: Services, job: Job, name: str) -> Problem | None:
    """Return the reason why a succeeded job does not have a result, if its report has one."""
    report = _read_report(services, job)
    reason = report.absent.get(name) if report else None
    return problem_of_missing_result(reason) if reason else None


def _read_report(services: Services, job: Job) -> ReportSummary | None:
    content = services.store.read(job.id, "report.json")
    return read_report_summary(content) if content else None


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
