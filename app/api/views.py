"""A job as the API shows it."""

from collections.abc import Sequence

from app.api.problems import job_problem
from app.api.schemas import Scan, Summary
from app.api.service import Service
from app.export.report import ReportSummary, read_report_summary
from app.jobs.job import Job

# A link is called as its file is, without the ending; "report" is report.json.
OTHER_LINKS = {"report.dcm": "structured_report"}


def path_of(job: str) -> str:
    """Path of a job."""
    return f"/v1/scans/{job}"


def summaries(service: Service, jobs: Sequence[Job]) -> tuple[Summary, ...]:
    """Jobs in a list."""
    places = service.jobs.places() if any(job.state == "queued" for job in jobs) else {}
    return tuple(_summary(job, places) for job in jobs)


def scan(service: Service, job: Job) -> Scan:
    """A job with its findings, which are read from its published report."""
    report = _report(service, job) if job.state == "succeeded" else None
    summary = summaries(service, [job])[0]
    return Scan(
        **dict(summary),
        research_use_only=True,
        findings=report.findings if report else None,
        lesion_volume_ml=report.lesion_volume_ml if report else None,
        selection=report.selection if report else None,
        timings=report.seconds if report else None,
    )


def why_absent(service: Service, job: Job, name: str) -> dict[str, str] | None:
    """The problem that a job's report names for a result that it does not have."""
    report = _report(service, job)
    return report.absent.get(name) if report else None


def _report(service: Service, job: Job) -> ReportSummary | None:
    content = service.store.read(job.id, "report.json")
    return read_report_summary(content) if content else None


def _summary(job: Job, places: dict[str, int]) -> Summary:
    links = {"self": path_of(job.id), "events": f"{path_of(job.id)}/events"}
    if job.state in {"queued", "running"}:
        links["cancel"] = f"{path_of(job.id)}/cancel"
    if job.state == "succeeded":
        # Only those there are: a scan that is no DICOM has no DICOM results.
        names = {OTHER_LINKS.get(name, name.partition(".")[0]): name for name in job.results}
        links |= {link: f"{path_of(job.id)}/{name}" for link, name in names.items()}
    return Summary(
        id=job.id,
        state=job.state,
        stage=job.stage,
        progress=job.progress,
        place=places.get(job.id),
        priority=job.priority,
        model=job.model,
        created=job.created,
        started=job.started,
        ended=job.ended,
        problem=job_problem(job.problem) if job.problem else None,
        links=links,
    )
