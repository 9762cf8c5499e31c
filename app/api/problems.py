"""Error -> answer: which status each cause has, in one table, as RFC 9457 problem details."""

from collections.abc import Iterator, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app import errors
from app.api.schemas import Problem
from app.errors import CounterpartError

MEDIA_TYPE = "application/problem+json"

# A class that is not here has the status of its nearest base.
STATUS: dict[type[CounterpartError], int] = {
    CounterpartError: 500,
    errors.BadRequest: 400,
    errors.UploadError: 400,
    errors.UnknownModel: 400,
    errors.Unauthorised: 401,
    errors.NonCommercialModel: 403,
    errors.NotFound: 404,
    errors.NoSuchResult: 404,
    errors.NotFinished: 409,
    errors.AlreadyFinished: 409,
    errors.IdempotencyKeyReused: 409,
    errors.Cancelled: 409,
    errors.UploadTooLarge: 413,
    errors.NotAnImageFormat: 415,
    errors.UnreadableScan: 422,
    errors.CannotAnalyse: 422,
    errors.UnsatisfiableRange: 416,
    errors.QueueFull: 429,
    errors.NotReady: 503,
    errors.StoreUnavailable: 503,
    errors.BundleError: 503,
    errors.ProviderUnavailable: 503,
    errors.StoreFull: 507,
}
# Seconds after which a refused upload may be tried again: about one scan on two cores.
RETRY_AFTER = {429: "30", 503: "10", 507: "600"}


def status_of(error: type[CounterpartError]) -> int:
    """HTTP status of a class of errors."""
    return next(STATUS[cls] for cls in error.__mro__ if cls in STATUS)


def job_problem(problem: Mapping[str, str]) -> Problem:
    """Why a job failed.

    What a scan did wrong is 422, whatever it would have been while receiving it; what the service
    did wrong keeps its status.
    """
    status = STATUS_OF_CODE.get(problem["code"], 500)
    return _problem(problem, status if status >= 500 else 422)


def absent_problem(problem: Mapping[str, str]) -> Problem:
    """Why a scan that succeeded does not have one of the results."""
    return _problem(problem, STATUS_OF_CODE.get(problem["code"], 404))


def told(error: CounterpartError) -> Problem:
    """An error as the API tells it."""
    return _problem(error.problem, status_of(type(error)))


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer that carries a problem."""
    every = dict(headers or {})
    if problem.status in RETRY_AFTER:
        every.setdefault("Retry-After", RETRY_AFTER[problem.status])
    if problem.status == 401:
        every["WWW-Authenticate"] = "Bearer"
    return JSONResponse(problem.model_dump(), problem.status, every, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of an application with a problem."""

    @app.exception_handler(CounterpartError)
    async def known(_: Request, error: CounterpartError) -> JSONResponse:
        return problem_response(told(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(_invalid(error))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return problem_response(_refused(error), error.headers)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> JSONResponse:
        cause = errors.BadRequest(
            "The connection ended before the upload did.", expected="the whole scan.", advice="Send it again."
        )
        return problem_response(_problem(cause.problem, 400))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> JSONResponse:
        cause = errors.InternalError(
            "The service met an unexpected fault.",
            expected="an answer.",
            advice="Try again; if it fails again, tell the operator the time: the log says where it happened.",
        )
        return problem_response(_problem(cause.problem, 500))


def _problem(cause: Mapping[str, str], status: int) -> Problem:
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


def _invalid(error: RequestValidationError) -> Problem:
    """What was wrong with which parameter; never its value."""
    places = [(str(e["loc"][0]), str(e["loc"][-1]), str(e["msg"])) for e in error.errors()]
    if any(place == "path" for place, _, _ in places):
        return _problem(_nothing_here().problem, 404)
    found = "; ".join(f"{place} parameter {name}: {message}" for place, name, message in places)
    cause = errors.BadRequest(f"{found}.", expected="what /docs lists.", advice="Correct the parameter.")
    return _problem(cause.problem, 400)


def _refused(error: HTTPException) -> Problem:
    """An answer of the framework itself: no such path, no such method."""
    if error.status_code == 404:
        return _problem(_nothing_here().problem, 404)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        cause = errors.BadRequest(
            "This path does not take this method.", expected=f"{allowed}.", advice="See /docs."
        ).problem
        return _problem({**cause, "code": "method_not_allowed", "title": "Method not allowed"}, 405)
    cause = errors.BadRequest("The request was refused.", expected="what /docs lists.", advice="See /docs.").problem
    return _problem(cause, error.status_code)


def _nothing_here() -> errors.NotFound:
    return errors.NotFound("There is nothing at this path.", expected="a path of /docs.", advice="Check the URL.")


def _leaves(cls: type[CounterpartError]) -> Iterator[type[CounterpartError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _leaves(child)


STATUS_OF_CODE = {cls.code: status_of(cls) for cls in _leaves(CounterpartError)}
