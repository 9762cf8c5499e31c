"""Dependencies of the routes: the services, the check of the query, and the job id."""

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Path, Request

from app.api.calls import Calls
from app.api.follower import JobFollower
from app.api.upload import Uploads
from app.errors import BadRequest, CounterpartError, InternalError, error_location
from app.jobs.engine import Engine
from app.jobs.queue import JobQueue
from app.jobs.store import Store
from app.jobs.worker import WorkerHealth
from app.settings import Settings, nearest_name

JobId = Annotated[str, Path(description="Id of the job.", examples=["0f3a9c51b2d4e678-5e1b7a90c3d2f468"])]


@dataclass
class Readiness:
    """Result of loading the models: the only mutable part of the services.

    Attributes
    ----------
    loading : bool
        True until every model has passed its golden test.
    error : CounterpartError or None
        The error that stopped the loading.
    """

    loading: bool = True
    error: CounterpartError | None = None

    def load(self, engine: Engine) -> None:
        """Load the models and keep an error for `check`."""
        try:
            engine.warm_up()
            self.error = None
        except CounterpartError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001  # /livez and finished jobs must stay available
            location = error_location(error)
            self.error = InternalError(
                f"Loading the models raised {location['exception']} in {location['where']}.",
                expected="models that load.",
                advice="Run `counterpart doctor`.",
            )
        self.loading = False

    def check(self) -> None:
        """Raise if the models could not be loaded.

        Raises
        ------
        CounterpartError
            The error that stopped the loading.
        """
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class Services:
    """The parts of a running service that the routes use; `app.main` creates it."""

    settings: Settings
    engine: Engine
    store: Store
    queue: JobQueue
    readiness: Readiness
    worker_health: WorkerHealth
    calls: Calls
    follower: JobFollower
    uploads: Uploads

    def stop(self) -> None:
        """Let waiting callers and senders get an answer, because the process ends."""
        self.follower.stop()
        self.uploads.stop()


def get_services(request: Request) -> Services:
    """Return the services of the application that received a request."""
    return cast("Services", request.app.state.services)


ServicesDependency = Annotated[Services, Depends(get_services)]


def refuse_unknown_parameters(request: Request) -> None:
    """Refuse a query with a parameter that the route does not have: a typing error would have no effect.

    The message does not repeat the name, which may contain patient data.

    Raises
    ------
    BadRequest
    """
    # FastAPI keeps the document after its first use.
    operation = request.app.openapi()["paths"][request.scope["route"].path][request.method.lower()]
    known = sorted(parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "query")
    for name in request.query_params:
        if name not in known:
            nearest = nearest_name(name, known)
            raise BadRequest(
                "The query has an unknown parameter.",
                expected=f"{nearest}." if nearest else f"{', '.join(known)}.",
                advice="Correct the name of the parameter, or remove it.",
            )
