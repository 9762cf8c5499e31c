"""What the API says, as JSON."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from app.export.report import Finding, ModelSelectionReport
from app.jobs.job import Priority, State
from app.manifest import Manifest


class Schema(BaseModel):
    model_config = ConfigDict(frozen=True)


class Problem(Schema):
    """RFC 9457 problem details; `code` is stable, the sentences are for people."""

    model_config = ConfigDict(
        frozen=True,
        json_schema_extra={
            "example": {
                "type": "urn:problem-type:counterpart:irregular_slices",
                "title": "Missing, tilted or unevenly spaced slices",
                "status": 422,
                "detail": "Slice 57 of 180 is missing. Expected: evenly spaced slices. Export the whole series.",
                "code": "irregular_slices",
                "found": "Slice 57 of 180 is missing.",
                "expected": "evenly spaced slices.",
                "advice": "Export the whole series.",
            }
        },
    )

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable identifier of the cause.")
    found: str = Field(description="What was met; never a patient's value.")
    expected: str = Field(description="What would have been accepted.")
    advice: str = Field(description="What to do now.")


class Event(Schema):
    """What a server-sent event says of a job."""

    state: State
    stage: str | None
    percent: float = Field(ge=0, le=100)
    place: int | None = Field(description="Place in the queue, 1 for the next; null unless queued.")
    seconds_left: float | None = Field(description="By the pace so far; null where that cannot be told.")


class Summary(Schema):
    """A job in a list."""

    id: str
    state: State
    stage: str | None = Field(description="read, infer or export while it runs.")
    progress: float = Field(ge=0, le=1, description="Share of the whole job that is done.")
    place: int | None = Field(description="Place in the queue, 1 for the next; null unless queued.")
    priority: Priority = Field(description="stat goes before all that is routine.")
    model: str | None = Field(description="Id of the model that was used; before the end, what was asked for.")
    created: datetime
    started: datetime | None
    ended: datetime | None
    problem: Problem | None = Field(description="Why it failed.")
    links: dict[str, str] = Field(description="Where it and its results are.")


class Scan(Summary):
    """A job with what was found. Positions are RAS+ millimetres."""

    research_use_only: bool = Field(True, description="Not a medical device. Not for diagnosis.")
    findings: tuple[Finding, ...] | None = Field(description="Connected lesions; null unless succeeded.")
    lesion_volume_ml: float | None = Field(description="Volume of the mask; null unless succeeded.")
    selection: ModelSelectionReport | None = Field(
        description="How the model was chosen, and whether surely; null unless succeeded."
    )
    timings: dict[str, float] | None = Field(description="Seconds of each stage; null unless succeeded.")


class ScanList(Schema):
    scans: tuple[Summary, ...] = Field(description="Newest first.")
    next: str | None = Field(description="Path of the next page.")


class Model(Schema):
    id: str = Field(description="For ?model=; its name alone takes the newest version.")
    name: str
    version: str
    title: str
    intended_use: str
    modality: str
    sequence: str
    licence: str
    link: str


class ModelList(Schema):
    models: tuple[Model, ...]


class ModelCard(Schema):
    manifest: Manifest
    card: str | None = Field(description="Markdown.")


class Health(Schema):
    status: str


class Readiness(Health):
    provider: str = Field(description="Where networks run.")
    models: tuple[str, ...] = Field(description="Each made a real inference, where this process has a worker.")
    workers: int = Field(ge=0, description="Living workers, of this process and all others.")
