"""Problem details (RFC 9457): the HTTP status and the response for each error."""

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from app import errors
from app.errors import CounterpartError

MEDIA_TYPE = "application/problem+json"

# A class without an entry has the status of its nearest base class.
STATUS: dict[type[CounterpartError], int] = {
    CounterpartError: 500,
    errors.BadRequest: 400,
    errors.UploadError: 400,
    errors.UnknownModel: 400,
    errors.Unauthorised: 401,
    errors.LoginFailed: 401,
    errors.Forbidden: 403,
    errors.NonCommercialModel: 403,
    errors.ForeignHost: 403,
    errors.ForeignOrigin: 403,
    errors.NotFound: 404,
    errors.NoSuchResult: 404,
    errors.UnknownSource: 404,
    errors.NotAcceptable: 406,
    errors.UploadTooSlow: 408,
    errors.NotFinished: 409,
    errors.AlreadyFinished: 409,
    errors.IdempotencyKeyReused: 409,
    errors.Cancelled: 409,
    errors.UploadTooLarge: 413,
    errors.SearchTooBroad: 413,  # PS3.18 table 10.6.3-6
    errors.NotAnImageFormat: 415,
    errors.UnsupportedEncoding: 415,
    errors.UnreadableScan: 422,
    errors.CannotAnalyse: 422,
    errors.UnsatisfiableRange: 416,
    errors.QueueFull: 429,
    errors.HeaderTooLarge: 431,
    errors.MissingExtra: 501,
    errors.SourceUnavailable: 502,
    errors.NotReady: 503,
    errors.StoreUnavailable: 503,
    errors.DatabaseUnavailable: 503,
    errors.TooManyStreams: 503,
    errors.TooManyConnections: 503,
    errors.IdentityUnavailable: 503,
    errors.AuditUnavailable: 503,
    errors.BundleError: 503,
    errors.ProviderUnavailable: 503,
    errors.StoreFull: 507,
}
# Seconds until a refused request may succeed. 429: about the duration of one scan on two cores.
RETRY_AFTER = {429: "30", 503: "10", 507: "600"}


class Problem(BaseModel):
    """Problem details (RFC 9457). The code is stable, the sentences may change."""

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
    found: str = Field(description="The cause, without any patient data.")
    expected: str = Field(description="The input or state that the service accepts.")
    advice: str = Field(description="The next step for the caller.")


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the problem responses of a route for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    responses: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        responses[status] = {"description": "Problem", "content": content}
        if status in RETRY_AFTER:
            responses[status]["headers"] = {"Retry-After": _header("Seconds until the request may succeed.")}
        if status == 401:
            responses[status]["headers"] = {"WWW-Authenticate": _header("Bearer")}
    return responses


def _header(description: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": "string"}}


def status_of(error: type[CounterpartError]) -> int:
    """Return the HTTP status of an error class."""
    return next(STATUS[cls] for cls in error.__mro__ if cls in STATUS)


def problem_of(error: CounterpartError) -> Problem:
    """Return the problem details of an error."""
    return _to_problem(error.problem, status_of(type(error)))


def problem_of_failed_job(problem: Mapping[str, str]) -> Problem:
    """Return the problem details of a failed job.

    Any fault of the scan has status 422, even if the same fault has another status during the upload.
    A fault of the service keeps its status.
    """
    status = STATUS_OF_CODE.get(problem["code"], 500)
    return _to_problem(problem, status if status >= 500 else 422)


def problem_of_missing_result(problem: Mapping[str, str]) -> Problem:
    """Return the problem details of a result that a succeeded scan does not have."""
    return _to_problem(problem, STATUS_OF_CODE.get(problem["code"], 404))


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the HTTP response that carries a problem."""
    all_headers = {"X-Content-Type-Options": "nosniff", **(headers or {})}
    if problem.status in RETRY_AFTER:
        all_headers.setdefault("Retry-After", RETRY_AFTER[problem.status])
    if problem.status == 401:
        all_headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem.model_dump(), problem.status, all_headers, media_type=MEDIA_TYPE)


def install_handlers(app: FastAPI) -> None:
    """Answer every error of an application with a problem."""

    @app.exception_handler(CounterpartError)
    async def counterpart_error(_: Request, error: CounterpartError) -> JSONResponse:
        return problem_response(problem_of(error))

    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    @app.exception_handler(PoolTimeout)
    async def database_error(_: Request, error: SQLAlchemyError) -> JSONResponse:
        cause = errors.DatabaseUnavailable(
            f"The job database does not answer as expected ({type(error).__name__}).",
            expected="a database that can be read and written.",
            advice="Try again later (see Retry-After). The operator must check the database.",
        )
        return problem_response(problem_of(cause))

    @app.exception_handler(RequestValidationError)
    async def invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(_problem_of_validation_error(error))

    @app.exception_handler(HTTPException)
    async def framework_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            # Each method is a route of its own, and the framework names the methods of one route only.
            headers["Allow"] = ", ".join(sorted(allowed_methods(app, request)))
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
        return problem_response(_problem_of_http_exception(error, headers), headers)

    @app.exception_handler(ClientDisconnect)
    async def client_disconnect(_: Request, __: ClientDisconnect) -> JSONResponse:
        error = errors.BadRequest(
            "The connection closed before the upload was complete.",
            expected="the whole scan.",
            advice="Send the scan again.",
        )
        return problem_response(problem_of(error))

    @app.exception_handler(Exception)
    async def unexpected_error(_: Request, __: Exception) -> JSONResponse:
        error = errors.InternalError(
            "The service met an unexpected fault.",
            expected="a response.",
            advice="Try again. If it fails again, report the time to the operator: the log has the location.",
        )
        return problem_response(problem_of(error))


def allowed_methods(app: FastAPI, request: Request) -> set[str]:
    """Return the methods that the path of a request accepts."""
    methods = {"OPTIONS"}
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in app.router.routes):
            methods.add(method)
    return methods


def _to_problem(cause: Mapping[str, str], status: int) -> Problem:
    return Problem(
        type=f"urn:problem-type:counterpart:{cause['code']}",
        title=cause["title"],
        status=status,
        detail=f"{cause['found']} Expected: {cause['expected']} {cause['advice']}",
        code=cause["code"],
        found=cause["found"],
        expected=cause["expected"],
        advice=cause["advice"],
    )


def _problem_of_validation_error(error: RequestValidationError) -> Problem:
    """Name each invalid parameter, never its value: it may hold patient data."""
    invalid = [(str(e["loc"][0]), str(e["loc"][-1]), str(e["msg"])) for e in error.errors()]
    if any(location == "path" for location, _, _ in invalid):
        return problem_of(_unknown_path())
    found = "; ".join(f"{location} parameter {name}: {message}" for location, name, message in invalid)
    return problem_of(
        errors.BadRequest(f"{found}.", expected="a parameter that /docs lists.", advice="Correct the parameter.")
    )


def _problem_of_http_exception(error: HTTPException, headers: Mapping[str, str]) -> Problem:
    """Return the problem details of an error that the framework raised: unknown path, wrong method."""
    if error.status_code == 404:
        return problem_of(_unknown_path())
    if error.status_code == 405:
        allowed = headers.get("Allow", "another method")
        cause = errors.BadRequest(
            "This path does not accept this method.", expected=f"{allowed}.", advice="See /docs."
        ).problem
        return _to_problem({**cause, "code": "method_not_allowed", "title": "Method not allowed"}, 405)
    cause = errors.BadRequest(
        "The request was refused.", expected="a request that /docs describes.", advice="See /docs."
    ).problem
    return _to_problem(cause, error.status_code)


def _unknown_path() -> errors.NotFound:
    return errors.NotFound("Nothing exists at this path.", expected="a path that /docs lists.", advice="Check the URL.")


def _subclasses(cls: type[CounterpartError]) -> Iterator[type[CounterpartError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


STATUS_OF_CODE = {cls.code: status_of(cls) for cls in _subclasses(CounterpartError)}
