"""/livez, /readyz and /metrics: health and metrics of a process."""

from fastapi import APIRouter, Depends, Response

from app.api.dependencies import ServicesDependency
from app.api.identity import require
from app.api.problems import problem_responses
from app.api.schemas import Health, ReadyHealth
from app.errors import CounterpartError, NotReady, error_location

router = APIRouter(tags=["health"])


@router.get("/livez")
async def get_liveness() -> Health:
    """Confirm that the process answers."""
    return Health(status="live")


@router.get("/readyz", responses=problem_responses(503))
async def get_readiness(services: ServicesDependency) -> ReadyHealth:
    """Confirm that all models passed a real inference, that store and database answer, and that the worker works."""
    services.readiness.check()
    if services.readiness.loading:
        raise NotReady(
            "The models are still loading.",
            expected="loaded models.",
            advice="Try again in a few seconds (see Retry-After).",
        )
    services.worker_health.check()
    await services.calls.probe(services.store.check)
    try:
        workers = await services.calls.probe(services.queue.count_workers)
    except CounterpartError:
        raise
    except Exception as error:  # noqa: BLE001  # each database driver raises classes of its own
        raise NotReady(
            f"The job database does not answer ({error_location(error)['exception']}).",
            expected="a database that can be read.",
            advice="Check COUNTERPART_DATABASE, and the disk of COUNTERPART_STORE.",
        ) from None
    models = tuple(m.id for m in services.engine.manifests)
    return ReadyHealth(status="ready", provider=services.engine.provider, models=models, workers=workers)


@router.get(
    "/metrics",
    dependencies=[Depends(require("metrics"))],
    response_class=Response,
    responses={
        200: {"description": "Metrics in the text format", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **problem_responses(401, 403, 503),
    },
)
async def get_metrics(services: ServicesDependency) -> Response:
    """Return the Prometheus metrics of this process and of the queue."""
    return Response(await services.calls.probe(services.queue.metrics), media_type="text/plain; version=0.0.4")
