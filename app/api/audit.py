"""/v1/audit: export of the audit trail."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse

from app.api.dependencies import ServicesDependency
from app.api.identity import require
from app.api.problems import problem_responses
from app.jobs.audit import PAGE_ROWS, AuditTrail

router = APIRouter(tags=["operation"])


@router.get(
    "/v1/audit",
    dependencies=[Depends(require("admin", "export"))],
    response_class=StreamingResponse,
    responses={
        200: {"description": "One JSON object a line, in order of `id`", "content": {"application/jsonl": {}}},
        **problem_responses(400, 401, 403, 503),
    },
)
async def export_audit(
    request: Request,
    services: ServicesDependency,
    after: Annotated[int, Query(ge=0, lt=2**63, description="Only rows with a larger `id`.")] = 0,
) -> StreamingResponse:
    """Export the audit trail as JSON lines. To continue later, send the `id` of the last line as `after`."""
    trail: AuditTrail = request.app.state.auditor.trail
    first = await services.calls.query(trail.read, after)

    async def lines() -> AsyncIterator[str]:
        page = first
        while page:
            yield "".join(row.to_line() for row in page)
            # A short page is the end at this moment: the row of this export belongs to the next one.
            is_last = len(page) < PAGE_ROWS
            page = [] if is_last else await services.calls.query(trail.read, page[-1].id)

    return StreamingResponse(lines(), media_type="application/jsonl", headers={"Cache-Control": "no-store"})
