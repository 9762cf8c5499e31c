"""What the routes share: one object, made by `app.main`, found in the application's state."""

import secrets
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.errors import CounterpartError, InternalError, Unauthorised, error_location
from app.jobs.engine import Engine
from app.jobs.queue import JobQueue
from app.jobs.store import Store
from app.jobs.workflow import JobService
from app.settings import Settings

bearer = HTTPBearer(auto_error=False, description="COUNTERPART_TOKEN, where the operator set one.")


@dataclass
class Readiness:
    """Whether every model made a real inference; the only thing here that changes."""

    loading: bool = True
    broken: CounterpartError | None = None

    def load(self, engine: Engine) -> None:
        """Load the models; what goes wrong is kept for `check` to tell."""
        try:
            engine.warm_up()
        except CounterpartError as error:
            self.broken = error
        except Exception as error:  # noqa: BLE001  # /livez and the finished jobs go on answering
            self.broken = InternalError(
                f"Loading the models met an unexpected {error_location(error)['exception']} in {error_location(error)['where']}.",
                expected="models that load.",
                advice="Run `counterpart doctor`.",
            )
        self.loading = False

    def check(self) -> None:
        """Refuse what would need a model that cannot be used.

        Raises
        ------
        CounterpartError
            What went wrong when the models were loaded.
        """
        if self.broken is not None:
            raise self.broken


@dataclass(frozen=True)
class Service:
    """The parts of a running service."""

    settings: Settings
    engine: Engine
    store: Store
    jobs: JobService
    readiness: Readiness

    @property
    def queue(self) -> JobQueue:
        """Return the queue of the jobs."""
        return self.jobs.queue


def of(request: Request) -> Service:
    """The service that a request came to."""
    return cast("Service", request.app.state.service)


Of = Annotated[Service, Depends(of)]


def authorise(service: Of, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
    """Let in who carries the token, where there is one; compared in constant time.

    Raises
    ------
    Unauthorised
        No token, or another.
    """
    token = service.settings.token
    if token is None:
        return
    shown = credentials.credentials if credentials else ""
    if not secrets.compare_digest(shown.encode(), token.get_secret_value().encode()):
        raise Unauthorised(
            "The request carries no token, or a wrong one.",
            expected="Authorization: Bearer <token>.",
            advice="Ask the operator for the value of COUNTERPART_TOKEN.",
        )
