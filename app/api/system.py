"""Models, health and metrics."""

from fastapi import APIRouter, Depends, Response

from app.api.scans import problems
from app.api.schemas import Health, Model, ModelCard, ModelList
from app.api.schemas import Readiness as Ready
from app.api.service import Of, authorise
from app.errors import NotFound, NotReady, error_location
from app.manifest import Manifest

models = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(authorise)])
health = APIRouter(tags=["health"])


@models.get("", responses=problems(401))
def list_models(service: Of) -> ModelList:
    """List the installed models."""
    return ModelList(models=tuple(_model(manifest) for manifest in service.engine.manifests))


@models.get("/{model}", responses=problems(401, 404))
def get_model(service: Of, model: str) -> ModelCard:
    """Show a model's manifest and card."""
    for manifest in service.engine.manifests:
        if manifest.id == model:
            return ModelCard(manifest=manifest, card=service.engine.card(model))
    raise NotFound(
        "There is no model of this id.",
        expected=", ".join(m.id for m in service.engine.manifests) + ".",
        advice="GET /v1/models lists them.",
    )


@health.get("/livez")
async def live() -> Health:
    """Tell that the process answers."""
    return Health(status="live")


@health.get("/readyz", responses=problems(503))
def ready(service: Of) -> Ready:
    """Tell whether every model of this process made a real inference, and store and database answer."""
    service.readiness.check()
    if service.readiness.loading:
        raise NotReady(
            "The models are being loaded.", expected="a few seconds of patience.", advice="Ask again (see Retry-After)."
        )
    service.store.check()
    try:
        workers = service.queue.count_workers()
    except Exception as error:  # noqa: BLE001  # whatever the driver raises
        raise NotReady(
            f"The database of the jobs does not answer ({error_location(error)['exception']}).",
            expected="a database that can be read.",
            advice="Check COUNTERPART_DATABASE, and the disk of COUNTERPART_STORE.",
        ) from None
    models = tuple(m.id for m in service.engine.manifests)
    return Ready(status="ready", provider=service.engine.provider, models=models, workers=workers)


@health.get("/metrics", dependencies=[Depends(authorise)], response_class=Response)
def metrics(service: Of) -> Response:
    """Prometheus metrics of this process and its queue."""
    return Response(service.queue.metrics(), media_type="text/plain; version=0.0.4")


def _model(manifest: Manifest) -> Model:
    return Model(
        id=manifest.id,
        name=manifest.name,
        version=manifest.version,
        title=manifest.title,
        intended_use=manifest.intended_use,
        modality=manifest.modality,
        sequence=manifest.sequence,
        licence=manifest.licence.licence,
        link=f"/v1/models/{manifest.id}",
    )
