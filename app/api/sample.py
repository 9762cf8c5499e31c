"""/v1/scans/sample: send the sample scan."""

from pathlib import Path
from tempfile import TemporaryDirectory

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from app.analysis import AnalysisRequest
from app.api.dependencies import Services, ServicesDependency
from app.api.identity import require
from app.api.problems import problem_responses
from app.api.scans import JOB_HEADERS, RETRY_AFTER_SECONDS, RETRY_HEADER, describe_job, scan_path
from app.api.schemas import ScanDetail
from app.sample import make_sample

router = APIRouter(prefix="/v1/scans", tags=["scans"])


@router.post(
    "/sample",
    status_code=202,
    response_model=ScanDetail,
    dependencies=[Depends(require("send", "send"))],
    responses={
        202: {"description": "The job of the sample", "headers": JOB_HEADERS | RETRY_HEADER},
        **problem_responses(401, 403, 429, 500, 501, 503, 507),
    },
)
async def send_sample(request: Request, services: ServicesDependency) -> Response:
    """Send the sample scan: a template brain with a synthetic lesion. It is the same job each time."""
    services.readiness.check()
    await services.calls.query(services.queue.check_capacity, 0)
    job = request.state.job = await services.calls.transfer(_submit, services)
    detail = await services.calls.query(lambda: describe_job(services, services.queue.get(job)))
    headers = {"Location": scan_path(services, job), "Retry-After": RETRY_AFTER_SECONDS}
    return JSONResponse(detail.model_dump(mode="json"), 202, headers)


def _submit(services: Services) -> str:
    """Make the sample and return its job.

    Raises
    ------
    MissingExtra
        The package with the template is not installed.
    """
    # The sample is a T1, which its file cannot state.
    model = next((m.name for m in services.engine.manifests if (m.modality, m.sequence) == ("MR", "T1")), None)
    with TemporaryDirectory(dir=services.settings.folder) as folder, services.store.receive_upload() as upload:
        upload.begin()
        upload.write(make_sample(Path(folder)).scan.read_bytes())
        upload.end()
        return services.queue.submit(upload, AnalysisRequest(model=model), None)
