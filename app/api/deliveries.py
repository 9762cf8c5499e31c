"""/v1/scans/{job}/deliveries: repeat deliveries of results."""

from fastapi import APIRouter, Depends

from app.api.dependencies import JobId, Services, ServicesDependency
from app.api.identity import require
from app.api.problems import problem_responses
from app.api.scans import describe_job
from app.api.schemas import ScanDetail

router = APIRouter(prefix="/v1/scans", tags=["scans"], dependencies=[Depends(require("send", "retry"))])


@router.post("/{job}/deliveries/retry", responses=problem_responses(401, 403, 404, 503))
async def retry_deliveries(services: ServicesDependency, job: JobId) -> ScanDetail:
    """Repeat all unsent deliveries of a scan now, those that were given up included."""
    return await services.calls.query(_retry, services, job)


def _retry(services: Services, job: str) -> ScanDetail:
    found = services.queue.get(job)
    services.queue.deliveries.retry(job)
    return describe_job(services, found)
