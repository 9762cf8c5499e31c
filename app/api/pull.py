"""Retrieval of a series from a configured source, which the JSON body of `POST /v1/scans` names."""

from typing import Annotated

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.api.dependencies import Services, ThreadGroup
from app.api.json_body import read_body
from app.api.upload import explain_full_disk
from app.errors import BadRequest, SourceUnavailable, UnknownSource, UploadTooLarge
from app.ingest.dicomweb_source import retrieve_series
from app.jobs.store import Upload

MAX_BODY_BYTES = 10_000
MIB = 1 << 20
# More pulls at the same time wait. Their deadline is longer than that of any source should be.
_PULLS = ThreadGroup("pulls", 4, seconds=3600)

Uid = Annotated[str, Field(pattern=r"^(0|[1-9]\d*)(\.(0|[1-9]\d*))+$", max_length=64)]


class PullRequest(BaseModel):
    """Series at a source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(max_length=100, description="Name of a source that the operator configured.", examples=["pacs"])
    study: Uid = Field(description="StudyInstanceUID.")
    series: Uid = Field(description="SeriesInstanceUID.")


async def pull(request: Request, services: Services, upload: Upload) -> None:
    """Fill an upload with the series that a request names.

    Raises
    ------
    BadRequest, UploadTooLarge, UploadTooSlow, UnknownSource
        The body of the request is wrong.
    UnknownSeries, SourceUnavailable, UploadTooLarge
        See `retrieve_series`.
    """
    wanted = await _read(request)
    source = services.sources.get(wanted.source)
    if source is None:
        known = ", ".join(services.sources) or "no source, because the operator configured none"
        raise UnknownSource(
            "No source has this name.",
            expected=f"{known}.",
            advice="Correct the name, or ask the operator for an entry in COUNTERPART_SOURCES.",
        )
    limit = services.settings.max_upload_mb * MIB
    try:
        with explain_full_disk():
            await _PULLS.run(retrieve_series, source, wanted.study, wanted.series, limit, _Receiver(services, upload))
    except TimeoutError:
        raise SourceUnavailable(
            "The source did not send the series in time.",
            expected="a source that sends a series within its total_seconds.",
            advice="Try again later.",
        ) from None


class _Receiver:
    """Receiver that writes the instances of a series into an upload, up to the limits of the service."""

    def __init__(self, services: Services, upload: Upload) -> None:
        self._queue = services.queue
        self._max_files = services.settings.max_files
        self._upload = upload

    def begin(self) -> None:
        if len(self._upload.heads) >= self._max_files:
            raise UploadTooLarge(
                f"The series at the source has more than {self._max_files} instances.",
                expected=f"at most {self._max_files} instances.",
                advice="Name another series, or raise COUNTERPART_MAX_FILES.",
            )
        self._upload.begin()

    def write(self, data: bytes) -> None:
        self._queue.check_disk(len(data))
        self._upload.write(data)

    def end(self) -> None:
        self._upload.end()


async def _read(request: Request) -> PullRequest:
    body = await read_body(request, MAX_BODY_BYTES)
    try:
        return PullRequest.model_validate_json(body)
    except ValidationError as error:
        # The message does not repeat the values.
        names = sorted({str(fault["loc"][0]) if fault["loc"] else "the body" for fault in error.errors()})
        raise BadRequest(
            f"The JSON of the request is invalid: {', '.join(names)[:100]}.",
            expected='{"source": NAME, "study": StudyInstanceUID, "series": SeriesInstanceUID}.',
            advice="Correct the JSON. To send a scan itself, use another Content-Type.",
        ) from None
