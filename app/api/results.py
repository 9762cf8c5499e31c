"""/v1/scans/{job}/{name}: fetch a result file."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Depends, Header, Response
from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from app.api.dependencies import JobId, ServicesDependency, require_token
from app.api.problems import problem_of, problem_of_failed_job, problem_response, problem_responses
from app.api.schemas import find_reason_absent
from app.errors import BadRange, InternalError, NoSuchResult, NotFinished, UnsatisfiableRange
from app.export.outputs import OUTPUTS, media_type
from app.jobs.store import StoredFile

router = APIRouter(prefix="/v1/scans", tags=["scans"], dependencies=[Depends(require_token)])

# The names in the OpenAPI document; `Literal` needs a constant expression for the type checker.
RESULT_NAMES = tuple(output.name for output in OUTPUTS)

if TYPE_CHECKING:
    ResultName = str
else:
    ResultName = Literal[RESULT_NAMES]

_FILE = {"schema": {"type": "string", "format": "binary"}}
_CONTENT = dict.fromkeys((output.media_type for output in OUTPUTS), _FILE)


class ResultFile(FileResponse):
    """Response with a result file. A refused Range becomes a problem, and the temporary copy is removed afterwards.

    Parameters
    ----------
    stored : StoredFile
    name : str
        Name of the file for the caller.
    headers : mapping of str to str
    """

    def __init__(self, stored: StoredFile, name: str, headers: Mapping[str, str]) -> None:
        super().__init__(stored.path, headers=headers, media_type=media_type(name), filename=name)
        self._stored = stored

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file, or a problem instead of the plain-text refusal of Starlette."""
        refusal: Message | None = None

        async def send_unless_refused(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] in {400, 416}:
                refusal = message
            if refusal is None:
                await send(message)

        try:
            await super().__call__(scope, receive, send_unless_refused)
        finally:
            self._stored.close()
        if refusal is None:
            return
        expected = "bytes=0-99, within the file."
        advice = "Send no Range to get the whole file. HEAD returns its length."
        if refusal["status"] == 416:
            problem = problem_of(UnsatisfiableRange("The Range is outside the file.", expected=expected, advice=advice))
        else:
            problem = problem_of(BadRange("The Range header is malformed.", expected=expected, advice=advice))
        length = {name.decode(): value.decode() for name, value in refusal["headers"] if name == b"content-range"}
        await problem_response(problem, length)(scope, receive, send)


@router.head("/{job}/{name}", include_in_schema=False)
@router.get(
    "/{job}/{name}",
    response_class=FileResponse,
    responses={
        200: {"content": _CONTENT, "description": "The file"},
        206: {"content": _CONTENT, "description": "The requested Range of the file"},
        304: {"description": "The file has the ETag of If-None-Match"},
        **problem_responses(400, 401, 404, 409, 416, 422, 500, 503),
    },
)
def get_result(
    services: ServicesDependency,
    job: JobId,
    name: ResultName,
    if_none_match: Annotated[str | None, Header(description="ETag of a copy that the caller has.")] = None,
) -> Response:
    """Fetch a result file. HEAD, ETag and Range are supported. 409 until the job has succeeded.

    Images have the grid of the scan. `brain.nii.gz` exists if the brain was extracted from a head, and the DICOM
    results exist if the scan is DICOM. If a result does not exist, 404 states the reason.
    """
    found = services.queue.get(job)
    if found.state == "failed":
        assert found.problem is not None
        return problem_response(problem_of_failed_job(found.problem))
    if found.state != "succeeded":
        advice = "Send the scan again." if found.state == "cancelled" else "Wait until the job has succeeded."
        raise NotFinished(f"The job is {found.state}.", expected="a job that has succeeded.", advice=advice)
    # Published results never change, so the job's id is a valid ETag.
    headers = {"ETag": f'"{found.id}"', "Cache-Control": "private, no-cache"}
    if if_none_match and headers["ETag"] in re.split(r"\s*,\s*(?:W/)?", if_none_match.removeprefix("W/")):
        return Response(status_code=304, headers=headers)
    stored = services.store.fetch(found.id, name)
    if stored is not None:
        return ResultFile(stored, name, headers)
    if reason := find_reason_absent(services, found, name):
        return problem_response(reason)
    if name not in found.results:
        raise NoSuchResult(
            f"An older version analysed this scan, and it did not write {name}.",
            expected=", ".join(found.results) + ".",
            advice="DELETE the job and send the scan again.",
        )
    raise InternalError(
        f"{name} of a succeeded job is missing in the store.",
        expected=", ".join(RESULT_NAMES) + ".",
        advice="Check the store. DELETE the job and send the scan again.",
    )
