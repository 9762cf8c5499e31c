"""/v1/scans/{job}/{name}: fetch a result file. There is one route for each entry of `OUTPUTS`."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Response
from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from app.api.dependencies import JobId, Services, ServicesDependency
from app.api.identity import require
from app.api.problems import (
    Problem,
    problem_of,
    problem_of_failed_job,
    problem_of_missing_result,
    problem_response,
    problem_responses,
)
from app.errors import BadRange, InternalError, NoSuchResult, NotFinished, UnsatisfiableRange
from app.export.outputs import OUTPUTS, Output, media_type
from app.export.report import Report
from app.jobs.job import Job
from app.jobs.store import StoredFile

router = APIRouter(prefix="/v1/scans", tags=["scans"], dependencies=[Depends(require("read", "download"))])

REPORT_NAME = "report.json"
RESULT_NAMES = tuple(output.name for output in OUTPUTS)

# For the OpenAPI document.
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_HEADERS = {
    "ETag": {"description": "Id of the job: results never change.", "schema": {"type": "string"}},
    "Content-Disposition": {"description": "File name with the id of the job.", "schema": {"type": "string"}},
    "Accept-Ranges": {"description": "`bytes`.", "schema": {"type": "string"}},
}
_CONTENT_RANGE = {"Content-Range": {"description": "Position of the part in the file.", "schema": {"type": "string"}}}
_STATUSES = (400, 401, 403, 404, 409, 416, 422, 500, 503)


class ResultFile(FileResponse):
    """Response with a result file. A refused Range becomes a problem, and the temporary copy is removed afterwards.

    Parameters
    ----------
    stored : StoredFile
    job : str
        Id of the job, which begins the name of the file for the caller.
    name : str
    headers : mapping of str to str
    """

    def __init__(self, stored: StoredFile, job: str, name: str, headers: Mapping[str, str]) -> None:
        super().__init__(stored.path, headers=headers, media_type=media_type(name), filename=f"{job}-{name}")
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


def describe_responses(output: Output) -> dict[int | str, dict[str, Any]]:
    """Return the responses of a result's route for the OpenAPI document."""
    whole: dict[str, Any] = {"description": output.description, "headers": _HEADERS}
    if output.name == REPORT_NAME:
        whole["model"] = Report
    else:
        whole["content"] = {output.media_type: _BINARY}
    return {
        200: whole,
        206: {
            "description": "The requested Range of the file",
            "content": {output.media_type: _BINARY},
            "headers": _HEADERS | _CONTENT_RANGE,
        },
        304: {"description": "The file has the ETag of If-None-Match"},
        **problem_responses(*_STATUSES),
    }


def _add_routes(output: Output) -> None:
    """Add GET and HEAD of one result."""

    async def get_result(
        services: ServicesDependency,
        job: JobId,
        if_none_match: Annotated[str | None, Header(description="ETag of a copy that the caller has.")] = None,
    ) -> Response:
        return await services.calls.transfer(fetch_result, services, job, output.name, if_none_match)

    path = f"/{{job}}/{output.name}"
    name = f"get_{re.sub(r'[^a-z0-9]+', '_', output.name.lower())}"
    router.add_api_route(path, get_result, methods=["HEAD"], name=f"{name}_head", include_in_schema=False)
    router.add_api_route(
        path,
        get_result,
        methods=["GET"],
        name=name,
        summary=f"Fetch {output.name}",
        description=f"{output.description.rstrip('.')}. HEAD, ETag and Range are supported. 409 until the job has "
        "succeeded. If the scan has no such result, 404 states the reason.",
        response_class=FileResponse,
        responses=describe_responses(output),
    )


def fetch_result(services: Services, job: str, name: str, if_none_match: str | None) -> Response:
    """Return the response with a result file of a job, or with the reason why it does not exist.

    Raises
    ------
    NotFound, NotFinished, NoSuchResult, StoreUnavailable
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
        return ResultFile(stored, found.id, name, headers)
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


def find_reason_absent(services: Services, job: Job, name: str) -> Problem | None:
    """Return the reason why a succeeded job does not have a result, if its report has one."""
    report = services.read_report(job.id)
    reason = report.absent.get(name) if report else None
    return problem_of_missing_result(reason) if reason else None


for _output in OUTPUTS:
    _add_routes(_output)
