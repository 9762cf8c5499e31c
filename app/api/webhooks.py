"""/v1/webhooks/failed: the webhooks that were given up, for operators."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, ConfigDict, Field

from app.api.dependencies import ServicesDependency
from app.api.identity import require
from app.api.problems import problem_responses
from app.errors import NotFound
from app.jobs.webhooks import Message, Outbox

router = APIRouter(prefix="/v1/webhooks", tags=["operation"])


class FailedWebhook(BaseModel):
    """A webhook that was given up."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(description="Value of the header `webhook-id`.")
    job: str
    state: str = Field(description="succeeded, failed or cancelled.")
    time: datetime = Field(description="End of the job.")
    target: str
    attempts: int
    fault: str | None = Field(description="Why the last attempt failed.")


class FailedWebhooks(BaseModel):
    """The webhooks that were given up."""

    model_config = ConfigDict(frozen=True)

    webhooks: tuple[FailedWebhook, ...] = Field(description="Newest first, at most 1000.")


@router.get("/failed", dependencies=[Depends(require("admin"))], responses=problem_responses(401, 403, 503))
async def list_failed_webhooks(request: Request, services: ServicesDependency) -> FailedWebhooks:
    """List the webhooks that were given up after all attempts."""
    outbox: Outbox = request.app.state.outbox
    return FailedWebhooks(webhooks=tuple(map(_describe, await services.calls.query(outbox.list_failed))))


@router.post(
    "/failed/{webhook}/retry",
    status_code=202,
    dependencies=[Depends(require("admin", "retry"))],
    responses=problem_responses(401, 403, 404, 503),
)
async def retry_webhook(
    request: Request,
    services: ServicesDependency,
    webhook: Annotated[str, Path(description="`id` of the list.")],
) -> None:
    """Start the attempts of a webhook again."""
    outbox: Outbox = request.app.state.outbox
    if not await services.calls.query(outbox.retry, webhook):
        raise NotFound(
            "No webhook that was given up has this id.",
            expected="an `id` of GET /v1/webhooks/failed.",
            advice="List the webhooks again.",
        )


def _describe(message: Message) -> FailedWebhook:
    moment = datetime.fromtimestamp(message.time / 1000, UTC)
    names = ("id", "job", "state", "target", "attempts", "fault")
    return FailedWebhook(time=moment, **{name: getattr(message, name) for name in names})
