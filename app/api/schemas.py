"""JSON schemas of the API."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from app.api.follower import QUEUE_POSITION
from app.api.problems import Problem
from app.export.report import Finding, ModelSelectionReport
from app.jobs.deliveries import DeliveryState
from app.jobs.job import Priority, State
from app.manifest import Manifest
from app.site_profile import SiteProfile


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


class DeliverySchema(Schema):
    """Delivery of a result to a target of COUNTERPART_ROUTES."""

    target: str
    result: str = Field(description="Name of the result.")
    state: DeliveryState = Field(description="pending, sent or failed.")
    attempts: int = Field(ge=0)
    code: str | None = Field(description="Cause of the last failed attempt.")
    next_try: datetime | None = Field(description="Time of the next attempt; null unless pending.")
    ended: datetime | None = Field(description="Time at which the result was sent or given up; null if pending.")


class ScanDetail(ScanSummary):
    """A job with its findings. Positions are in RAS+ millimetres."""

    research_use_only: bool = Field(True, description="Not a medical device. Not for diagnosis.")
    warnings: tuple[str, ...] | None = Field(
        description="Why the result may be wrong as a whole, the most important reason first; null unless succeeded."
    )
    findings: tuple[Finding, ...] | None = Field(description="Connected lesions; null unless succeeded.")
    selection: ModelSelectionReport | None = Field(
        description="The rule that selected the model, and whether the scan surely fits; null unless succeeded."
    )
    timings: dict[str, float] | None = Field(description="Seconds of each stage; null unless succeeded.")
    deliveries: tuple[DeliverySchema, ...] = Field((), description="Deliveries of the results to other systems.")


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
    site_profiles: tuple[SiteProfile, ...] = Field(
        description="Site profiles that replace the thresholds of the manifest for their scanners."
    )


class Health(Schema):
    """State of the process."""

    status: str


class ReadyHealth(Health):
    """State of a process that is ready."""

    provider: str = Field(description="Execution provider of the networks.")
    models: tuple[str, ...] = Field(description="Ids of the models. A process with a worker has tested each one.")
    workers: int = Field(ge=0, description="Running workers in all processes.")
