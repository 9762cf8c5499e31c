"""POST /dicomweb/studies: store instances (STOW-RS, PS3.18 section 10.5). Each series becomes a job."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse
from python_multipart.multipart import parse_options_header

from app.analysis import AnalysisRequest
from app.api.dependencies import Services, ServicesDependency
from app.api.identity import require
from app.api.problems import problem_responses
from app.api.upload import RelatedParser, declared_length, get_boundary
from app.errors import CounterpartError, NotAnImageFormat, QueueFull, StoreFull
from app.ingest.dicom.instances import Instance, identify
from app.jobs.store import Upload

router = APIRouter(prefix="/dicomweb", tags=["DICOMweb"], dependencies=[Depends(require("send", "send"))])

DICOM_JSON = "application/dicom+json"
# Failure Reason (0008,1197), PS3.18 table I.2-2 and PS3.4 annex B.
NOT_UNDERSTOOD, OTHER_STUDY, OTHER_CLASS, NO_CAPACITY = 0xC000, 0xA900, 0x0122, 0xA700
# Not part of the standard: ids of the jobs that analyse the stored series.
JOBS_HEADER = "Counterpart-Jobs"

StudyUid = Annotated[str, PathParameter(description="StudyInstanceUID.", pattern=r"^[0-9.]{1,64}$")]
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": 'multipart/related; type="application/dicom": one part for each instance.',
        "content": {"multipart/related": {"schema": {"type": "string", "format": "binary"}}},
    }
}
_ANSWER = {
    "content": {DICOM_JSON: {"schema": {"type": "object"}}},
    "headers": {JOBS_HEADER: {"description": "Ids of the jobs, separated by commas.", "schema": {"type": "string"}}},
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    **problem_responses(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 507),
    200: {"description": "All instances were stored", **_ANSWER},
    202: {"description": "Some instances were stored", **_ANSWER},
    409: {"description": "No instance was stored", **_ANSWER},
}


class InstanceParser(RelatedParser):
    """Parser of a STOW-RS body. An instance that is not an image is a failure of this instance, not of the request."""

    def finish(self) -> None:
        """Check that the body is complete and has a part."""
        self.check_complete()


@dataclass
class Outcome:
    """Outcome of the instances of one request.

    Attributes
    ----------
    stored : list of Instance
    failed : list of (Instance, int)
        With the Failure Reason.
    others : list of int
        Failure Reasons of parts without UIDs.
    jobs : list of str
    """

    stored: list[Instance] = field(default_factory=list)
    failed: list[tuple[Instance, int]] = field(default_factory=list)
    others: list[int] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """Status of the response (PS3.18 table 10.5.3-1)."""
        if not self.failed and not self.others:
            return 200
        return 202 if self.stored else 409


@router.post("/studies", openapi_extra=_BODY, responses=_RESPONSES)
async def store_instances(request: Request, services: ServicesDependency) -> Response:
    """Store instances of any studies."""
    return await _store(request, services, None)


@router.post("/studies/{study}", openapi_extra=_BODY, responses=_RESPONSES)
async def store_instances_of_study(request: Request, services: ServicesDependency, study: StudyUid) -> Response:
    """Store instances of one study. Those of other studies fail."""
    return await _store(request, services, study)


async def _store(request: Request, services: Services, study: str | None) -> Response:
    boundary = _check_media_type(request.headers.get("content-type", ""))
    services.readiness.check()
    await services.calls.query(services.queue.check_capacity, services.uploads.missing + declared_length(request))
    settings = services.settings
    with ExitStack() as stack:
        upload = stack.enter_context(services.store.receive_upload())
        parser = InstanceParser(boundary, upload, settings.max_files)
        await services.uploads.receive(request, upload, settings.max_upload_mb, settings.max_files, parser)
        files = stack.pop_all()
    outcome = await services.calls.transfer_with(files, _submit, services, upload, study)
    request.state.jobs = outcome.jobs
    headers = {JOBS_HEADER: ",".join(outcome.jobs)} if outcome.jobs else {}
    base = base_url(request, services)
    return JSONResponse(describe(outcome, base), outcome.status, headers, media_type=DICOM_JSON)


def base_url(request: Request, services: Services) -> str:
    """Return the public URL of the DICOMweb service. Without one in the settings, the host is that of the caller.

    The guard has checked the host.
    """
    if services.settings.public_url:
        return f"{services.settings.public_url.rstrip('/')}/dicomweb"
    return f"{request.url.scheme}://{request.headers.get('host', 'localhost')}{services.settings.root_path}/dicomweb"


def _check_media_type(content_type: str) -> bytes:
    """Return the boundary of the body."""
    media_type, options = parse_options_header(content_type)
    kind = options.get(b"type", b"application/dicom").lower()
    if media_type != b"multipart/related" or kind != b"application/dicom":
        raise NotAnImageFormat(
            "The body has an unsupported media type.",
            expected='Content-Type: multipart/related; type="application/dicom"; boundary=...',
            advice="Send instances as DICOM files. To send another scan, use POST /v1/scans.",
        )
    return get_boundary(options, 'multipart/related; type="application/dicom"')


def _submit(services: Services, upload: Upload, study: str | None) -> Outcome:
    """Make a job of each series.

    Raises
    ------
    QueueFull, StoreFull
        There is no capacity for any of the series.
    """
    outcome, series = Outcome(), _sort(upload, study)
    refusal: CounterpartError | None = None
    outcome.others, outcome.failed = series.others, series.failed
    for members in series.accepted.values():
        instances = [instance for instance, _ in members]
        try:
            outcome.jobs.append(_submit_series(services, [path for _, path in members]))
        except (QueueFull, StoreFull) as error:
            refusal = error
            outcome.failed += [(instance, NO_CAPACITY) for instance in instances]
        else:
            outcome.stored += instances
    if refusal is not None and not outcome.stored:
        raise refusal
    return outcome


def _submit_series(services: Services, paths: Sequence[Path]) -> str:
    with ExitStack() as stack:
        upload = stack.enter_context(services.store.receive_upload())
        for path in paths:
            upload.add_file(path)
        return services.queue.submit(upload, AnalysisRequest(), None)


@dataclass
class _Sorted:
    accepted: dict[tuple[str, str], list[tuple[Instance, Path]]]
    failed: list[tuple[Instance, int]]
    others: list[int]


def _sort(upload: Upload, study: str | None) -> _Sorted:
    """Sort the parts of a request by study and series."""
    found = _Sorted(defaultdict(list), [], [])
    for path in sorted(upload.folder.iterdir()):
        instance = identify(path)
        if instance is None:
            found.others.append(NOT_UNDERSTOOD)
        elif study is not None and instance.study != study:
            found.failed.append((instance, OTHER_STUDY))
        elif not instance.is_image:
            found.failed.append((instance, OTHER_CLASS))
        else:
            found.accepted[instance.study, instance.series].append((instance, path))
    return found


# ---- response ----------------------------------------------------------------------------------


def describe(outcome: Outcome, base: str) -> dict[str, Any]:
    """Return the data set of the response in DICOM JSON (PS3.18 table 10.5.3-2)."""
    sequences: Mapping[str, list[dict[str, Any]]] = {
        "00081198": [{**_reference(i), "00081197": _number(reason)} for i, reason in outcome.failed],
        "00081199": [
            {**_reference(i), "00081190": _text("UR", f"{base}/studies/{i.study}/series/{i.series}/instances/{i.uid}")}
            for i in outcome.stored
        ],
        "0008119A": [{"00081197": _number(reason)} for reason in outcome.others],
    }
    document = {tag: {"vr": "SQ", "Value": items} for tag, items in sequences.items() if items}
    studies = {instance.study for instance in outcome.stored}
    if len(studies) == 1:
        document["00081190"] = _text("UR", f"{base}/studies/{studies.pop()}")
    return document


def _reference(instance: Instance) -> dict[str, Any]:
    return {"00081150": _text("UI", instance.sop_class), "00081155": _text("UI", instance.uid)}


def _text(vr: str, value: str) -> dict[str, Any]:
    return {"vr": vr, "Value": [value]}


def _number(value: int) -> dict[str, Any]:
    return {"vr": "US", "Value": [value]}
