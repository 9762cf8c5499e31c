"""The service as an ASGI application, and the commands that serve it. `app.service` connects its parts."""

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from fastapi import APIRouter, FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi_offline import FastAPIOffline
from sqlalchemy.exc import SQLAlchemyError

from app import __version__
from app.api import (
    audit,
    deliveries,
    dicomweb,
    events,
    health,
    models,
    pages,
    problems,
    results,
    reviews,
    sample,
    scans,
    session,
    stow,
    token_list,
    webhooks,
)
from app.api.cross_origin import allow_origins
from app.api.listener import open_listener, run_server
from app.api.openapi import remove_validation_errors
from app.api.server import AccessLog, RequestGuard, RequestTelemetry, configure_logging
from app.errors import DatabaseUnavailable, StoreUnavailable
from app.export.report import RESEARCH_USE_ONLY
from app.jobs.database import check_database, run_within
from app.jobs.engine import Engine, check_engine
from app.jobs.store import is_open_to_others
from app.service import Roles, Service, create_engine, create_store
from app.settings import Settings

log = structlog.get_logger("counterpart.service")

# A new endpoint goes into one of these routers, or into a new one that is added here.
API_ROUTERS: tuple[APIRouter, ...] = (
    session.router,
    events.router,
    deliveries.router,
    sample.router,
    scans.router,
    results.router,
    reviews.router,
    models.router,
    pages.router,
    stow.router,
    dicomweb.router,
    audit.router,
    webhooks.router,
    token_list.router,
)

# Seconds that open requests have at shutdown. Without a limit, an event stream would delay it until its job ends.
SHUTDOWN_SECONDS = 5
# Seconds for the first check of the store.
CHECK_SECONDS = 4.0
# The store holds patients' scans.
PRIVATE_UMASK = 0o077

DESCRIPTION = (
    "Detects what differs between a brain scan and its generated healthy counterpart. "
    f"**{RESEARCH_USE_ONLY}** Every error is `application/problem+json` with a stable `code`."
)


def create_app(
    settings: Settings,
    engine: Engine | None = None,
    *,
    api: bool = True,
    worker: bool = True,
    node: bool = False,
) -> FastAPI:
    """Create the application.

    Parameters
    ----------
    settings : Settings
    engine : Engine, optional
        Used instead of the bundles that the settings name.
    api : bool
        Serve the whole API. If false, serve only health and metrics.
    worker : bool
        Analyse scans in this process, and send results to the targets of the routes.
    node : bool
        Receive series from DICOM peers.

    Raises
    ------
    DamagedBundle
        A manifest cannot be read.
    InvalidSettings
        The file of the routes cannot be used.
    """
    service = Service(settings, engine, Roles(api=api, worker=worker, node=node))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await run_in_threadpool(service.start)
        except Exception as error:
            app.state.start_error = error  # the server drops it
            raise
        yield
        await run_in_threadpool(service.stop)

    # The scripts of /docs come from the package, because hospital networks cannot reach a CDN.
    app = FastAPIOffline(
        title="Counterpart",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        # Operation ids are the names of the functions, so that generated clients stay the same.
        generate_unique_id_function=lambda route: route.name,
        # A redirect would repeat the caller's Host.
        redirect_slashes=False,
        # The spans of FastAPI contain query strings and the texts of exceptions, which may contain patient data.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    app.state.services = service.services
    for router in (*(API_ROUTERS if api else ()), health.router):
        app.include_router(router)
    _add_middleware(app, settings, service)
    problems.install_handlers(app)
    remove_validation_errors(app)
    return app


def _add_middleware(app: FastAPI, settings: Settings, service: Service) -> None:
    """Add the middleware. A request passes the last one first."""
    service.operations.attach(app)
    if settings.allowed_origins:
        allow_origins(app, settings.allowed_origins)
    app.add_middleware(RequestGuard, settings=settings)
    app.add_middleware(AccessLog)
    app.add_middleware(RequestTelemetry, metrics=service.metrics, traces=service.traces)


def serve(settings: Settings, engine: Engine | None = None, *, worker: bool = True) -> None:
    """Serve the API until a signal stops the process. For the parameters, see `create_app`.

    Raises
    ------
    UnsafeExposure
        The host is not loopback and no token is set.
    AddressUnavailable, StoreUnavailable, DatabaseUnavailable
    DamagedBundle
        A manifest cannot be read.
    NotReady, ProviderUnavailable
        A worker has no model, or no provider. The service does not start, because it could analyse no scan.
    """
    with _prepare(settings) as listener:
        engine = engine or create_engine(settings, worker=worker)
        if worker:
            check_engine(engine)
        _run_server(create_app(settings, engine, worker=worker), settings, listener)


def run_worker(settings: Settings, engine: Engine | None = None) -> None:
    """Analyse the scans that other processes receive, until a signal stops the process.

    Parameters
    ----------
    settings : Settings
        Health and metrics are served on its host and port.
    engine : Engine, optional
        Used instead of the bundles that the settings name.

    Raises
    ------
    UnsafeExposure
        The host is not loopback and no token is set.
    AddressUnavailable, StoreUnavailable, DatabaseUnavailable
    DamagedBundle, ProviderUnavailable
        A model cannot be used. The worker does not start, because it would fail every scan.
    """
    with _prepare(settings) as listener:
        engine = engine or create_engine(settings, worker=True)
        engine.warm_up()
        _run_server(create_app(settings, engine, api=False), settings, listener)


def run_node(settings: Settings, engine: Engine | None = None) -> None:
    """Receive series from DICOM peers and put them into the queue, until a signal stops the process.

    Parameters
    ----------
    settings : Settings
        Health and metrics are served on its host and port.
    engine : Engine, optional
        Used instead of the bundles that the settings name. Only its manifests are read.

    Raises
    ------
    UnsafeExposure
        The host or the node's host is not loopback, and no token or no peer is set.
    AddressUnavailable, StoreUnavailable, DatabaseUnavailable, InvalidSettings
    DamagedBundle
        A manifest cannot be read.
    """
    with _prepare(settings) as listener:
        _run_server(create_app(settings, engine, api=False, worker=False, node=True), settings, listener)


def _prepare(settings: Settings) -> socket.socket:
    """Check address, store and database before the models load, and return the listening socket."""
    settings.check_exposure()
    configure_logging()
    os.umask(PRIVATE_UMASK)
    if is_open_to_others(settings.folder):
        log.warning("store is open to other users of this machine: chmod 700 the folder")
    listener = open_listener(settings.host, settings.port)
    store = create_store(settings)
    try:
        run_within(CHECK_SECONDS, store.check)
    except TimeoutError:
        raise StoreUnavailable(
            f"The store does not answer within {CHECK_SECONDS:g} s.",
            expected="a store that can be written.",
            advice="Check COUNTERPART_STORE, AWS_ENDPOINT_URL and the network.",
        ) from None
    check_database(settings.database_url)
    return listener


def _run_server(app: FastAPI, settings: Settings, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    log.info("starting", host=settings.host, port=port, provider=settings.provider)
    options = {
        "timeout_graceful_shutdown": SHUTDOWN_SECONDS,
        "proxy_headers": bool(settings.trusted_proxies),
        "forwarded_allow_ips": settings.trusted_proxies,
    }
    try:
        run_server(app, listener, on_stop=app.state.services.stop, **options)
    except SystemExit:
        error = getattr(app.state, "start_error", None)
        if isinstance(error, SQLAlchemyError):
            raise DatabaseUnavailable(
                f"The job database refuses what the service needs ({type(error).__name__}).",
                expected="a database whose user may create and change tables.",
                advice="Check COUNTERPART_DATABASE and the rights of its user.",
            ) from None
        raise error or RuntimeError from None
