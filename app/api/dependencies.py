"""Dependencies of the routes: the services with their blocking calls, the check of the query, and the job id.

A route runs a blocking call in a thread of the call's own kind and with a deadline. A database or a bucket that hangs
holds the threads that wait for it. Then the other routes still have threads, and callers get 503 instead of no answer.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Annotated, Any, ParamSpec, TypeVar, cast

from fastapi import Depends, Path, Request
from fastapi.dependencies.models import Dependant

from app.api.catalogue import Catalogue
from app.api.follower import JobFollower
from app.api.upload import Uploads
from app.errors import (
    BadRequest,
    CounterpartError,
    DatabaseUnavailable,
    InternalError,
    StoreUnavailable,
    error_location,
)
from app.export.report import ReportSummary, read_report_summary
from app.ingest.dicomweb_source import DicomWebSource
from app.jobs.engine import Engine
from app.jobs.queue import JobQueue
from app.jobs.store import Store
from app.jobs.worker import WorkerHealth
from app.settings import Settings, nearest_name

P = ParamSpec("P")
T = TypeVar("T")

JobId = Annotated[str, Path(description="Id of the job.", examples=["0f3a9c51b2d4e678-5e1b7a90c3d2f468"])]

# ---- blocking calls ----------------------------------------------------------------------------


class ThreadGroup:
    """Threads for calls of one kind. The number of threads is limited, and no call waits longer than a deadline.

    The threads do not delay the end of the process.

    Parameters
    ----------
    name : str
    threads : int
        Largest number of calls at the same time. Further calls wait.
    seconds : float
        Deadline of a call, its waiting included.
    """

    def __init__(self, name: str, threads: int, seconds: float) -> None:
        self._name = name
        self._limit = threads
        self._seconds = seconds
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._threads = 0
        self._lock = threading.Lock()
        # One permit for each thread that waits for a call and was not counted on yet.
        self._idle = threading.Semaphore(0)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of a blocking call, or raise its exception.

        Raises
        ------
        TimeoutError
            The call did not end before its deadline. A call that has started continues in its thread.
        """
        future: Future[Any] = Future()
        self._calls.put((future, lambda: function(*args, **kwargs)))
        self._start_thread()
        async with asyncio.timeout(self._seconds):
            return cast("T", await asyncio.wrap_future(future))

    def _start_thread(self) -> None:
        if self._idle.acquire(blocking=False):
            return
        with self._lock:
            if self._threads >= self._limit:
                return
            self._threads += 1
        threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                future, call = self._calls.get_nowait()
            except queue.Empty:
                self._idle.release()
                future, call = self._calls.get()
            # A call whose caller has given up before its start is left out.
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001  # raised in the caller
                with suppress(Exception):  # the caller has given up
                    future.set_exception(error)
            else:
                with suppress(Exception):
                    future.set_result(result)
            del future, call


class Calls:
    """The kinds of blocking calls. A hanging call of one kind does not hold up those of another kind."""

    def __init__(self) -> None:
        self._queries = ThreadGroup("queries", 24, seconds=10)
        self._transfers = ThreadGroup("transfers", 32, seconds=300)
        self._probes = ThreadGroup("probes", 4, seconds=8)

    async def query(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that reads or changes the database.

        Raises
        ------
        DatabaseUnavailable
        """
        return await _or_database_unavailable(self._queries, function, *args, **kwargs)

    async def probe(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call for the health or the metrics.

        Raises
        ------
        DatabaseUnavailable
        """
        return await _or_database_unavailable(self._probes, function, *args, **kwargs)

    async def transfer(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call that moves a scan or a result to or from the store.

        Raises
        ------
        StoreUnavailable
        """
        try:
            return await self._transfers.run(function, *args, **kwargs)
        except TimeoutError:
            raise StoreUnavailable(
                "The store does not answer in time.",
                expected="a store that moves a scan within some minutes.",
                advice="Try again later (see Retry-After). The operator must check the store.",
            ) from None

    async def transfer_with(self, files: ExitStack, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call as `transfer`, and close the files that it uses when it ends, whoever waits for it.

        Raises
        ------
        StoreUnavailable
            The call takes too long. It may still succeed.
        """
        # Held by whoever closes the files: the thread, or the caller if no thread has started.
        claim = threading.Lock()

        def run() -> T:
            if not claim.acquire(blocking=False):
                raise TimeoutError
            with files:
                return function(*args, **kwargs)

        try:
            return await self.transfer(run)
        except BaseException:
            if claim.acquire(blocking=False):
                files.close()
            raise


async def _or_database_unavailable(
    group: ThreadGroup, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    try:
        return await group.run(function, *args, **kwargs)
    except TimeoutError:
        raise DatabaseUnavailable(
            "The job database or the store does not answer in time.",
            expected="an answer within some seconds.",
            advice="Try again later (see Retry-After). The operator must check the database and the store.",
        ) from None


# ---- services ----------------------------------------------------------------------------------


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
    """The parts of a running service that the routes use; `app.service` creates it."""

    settings: Settings
    engine: Engine
    store: Store
    queue: JobQueue
    readiness: Readiness
    worker_health: WorkerHealth
    calls: Calls
    follower: JobFollower
    uploads: Uploads
    sources: Mapping[str, DicomWebSource]
    catalogue: Catalogue

    def stop(self) -> None:
        """Let waiting callers and senders get an answer, because the process ends."""
        self.follower.stop()
        self.uploads.stop()

    def read_report(self, job: str) -> ReportSummary | None:
        """Return the summary of a job's published report, or None if the store does not have it."""
        content = self.store.read(job, "report.json")
        return read_report_summary(content) if content else None


def get_services(request: Request) -> Services:
    """Return the services of the application that received a request."""
    return cast("Services", request.app.state.services)


ServicesDependency = Annotated[Services, Depends(get_services)]


# ---- checks ------------------------------------------------------------------------------------


def refuse_unknown_parameters(request: Request) -> None:
    """Refuse a query with a parameter that the route does not have: a typing error would have no effect.

    The message does not repeat the name, which may contain patient data.

    Raises
    ------
    BadRequest
    """
    known = sorted(_query_names(request.scope["route"].dependant))
    for name in request.query_params:
        if name not in known:
            nearest = nearest_name(name, known)
            raise BadRequest(
                "The query has an unknown parameter.",
                expected=f"{nearest}." if nearest else f"{', '.join(known)}.",
                advice="Correct the name of the parameter, or remove it.",
            )


def _query_names(dependant: Dependant) -> set[str]:
    """Return the names of the parameters in the query of a route or dependency, those of its own dependencies included.

    The OpenAPI document has them too, and its first use would block the event loop for a second.
    """
    names = {field.alias for field in dependant.query_params}
    return names.union(*map(_query_names, dependant.dependencies))
