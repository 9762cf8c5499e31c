"""/v1/models: list the installed models, show a model's manifest, card and site profiles."""

from fastapi import APIRouter, Depends

from app.api.dependencies import Services, ServicesDependency
from app.api.identity import require
from app.api.problems import problem_responses
from app.api.schemas import Model, ModelCard, ModelList
from app.errors import NotFound
from app.manifest import Manifest

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(require("read"))])


@router.get("", responses=problem_responses(401, 403))
def list_models(services: ServicesDependency) -> ModelList:
    """List the installed models."""
    return ModelList(models=tuple(_to_model(services, manifest) for manifest in services.engine.manifests))


@router.get("/{model}", responses=problem_responses(401, 403, 404))
def get_model(services: ServicesDependency, model: str) -> ModelCard:
    """Show a model's manifest, card and site profiles."""
    for manifest in services.engine.manifests:
        if manifest.id == model:
            return ModelCard(
                manifest=manifest,
                card=services.engine.card(model),
                site_profiles=tuple(services.engine.profiles(model)),
            )
    raise NotFound(
        "No model has this id.",
        expected=", ".join(m.id for m in services.engine.manifests) + ".",
        advice="GET /v1/models lists the ids.",
    )


def _to_model(services: Services, manifest: Manifest) -> Model:
    return Model(
        id=manifest.id,
        name=manifest.name,
        version=manifest.version,
        title=manifest.title,
        intended_use=manifest.intended_use,
        modality=manifest.modality,
        sequence=manifest.sequence,
        licence=manifest.licence.licence,
        link=f"{services.settings.root_path}/v1/models/{manifest.id}",
    )
