"""Creation of the service: the only module that connects its parts."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import structlog
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi_offline import FastAPIOffline

from app import __version__
from app.api import events, health, models, problems, results, scans
from app.api.dependencies import Readiness, Services
from app.api.guard import RequestGuard
from app.api.logging import AccessLog, configure_logging
from app.export.report import RESEARCH_USE_ONLY
from app.jobs.bucket import BucketStore
from app.jobs.engine import BundleEngine, Engine
from app.jobs.metrics import Metrics
from app.jobs.retention import StorageLimits
from app.jobs.store import Store
from app.jobs.subprocess_engine import SubprocessEngine
from app.jobs.workflow import JobService
from app.settings import Settings

log = structlog.get_logger("counterpart.service")

# A new endpoint goes into one of these routers, or into a new one that is added here.
# `events` precedes `results`, because the path of a result also matches /v1/scans/{job}/events.
API_ROUTERS: tuple[APIRouter, ...] = (events.router, scans.router, results.router, models.router)

# Seconds that open requests have at shutdown. Without a limit, an event stream would delay it until its job ends.
SHUTDOWN_SECONDS = 5

DESCRIPTION = (
    "Detects what differs between a brain scan and its generated healthy counterpart. "
    f"**{RESEARCH_USE_ONLY}** Every error is `application/problem+json` with a stable `code`."
)


def create_app(settings: Settings, engine: Engine | None = None, *, api: bool = True, worker: bool = True) -> FastAPI:
    """Create the application.

    Parameters
    ----------
    settings : Settings
    engine : Engine, optional
        Used instead of the bundles that the settings name.
    api : bool
        Serve the whole API. If false, serve only health and metrics.
    worker : bool
        Analyse scans in this process.

    Raises
    ------
    DamagedBundle
        A manifest cannot be read.
    """
    engine = engine or create_engine(settings, worker=worker)
    metrics = Metrics()
    for manifest in engine.manifests:
        metrics.info.labels(manifest.id, engine.provider).set(1)
    store = BucketStore(settings.bucket, settings.folder) if settings.bucket else Store(settings.folder)
    limits = StorageLimits(settings.queue_limit, settings.min_free_gb, settings.keep_days, settings.keep_gb)
    jobs = JobService(engine, store, settings.database_url, metrics, limits)
    services = Services(settings, engine, store, jobs.queue, Readiness(loading=worker))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(partial(jobs.start, worker=worker))
        if worker:
            # In a thread: the server answers /livez while the models load.
            threading.Thread(target=services.readiness.load, args=(engine,), name="warm-up", daemon=True).start()
        yield
        await run_in_threadpool(jobs.stop, settings.drain_seconds)

    # The scripts of /docs come from the package, because hospital networks cannot reach a CDN.
    app = FastAPIOffline(
        title="Counterpart",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        root_path=settings.root_path,
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
    app.state.services = services
    for router in (*(API_ROUTERS if api else ()), health.router):
        app.include_router(router)
    app.add_middleware(RequestGuard, settings=settings)
    app.add_middleware(AccessLog)
    problems.install_handlers(app)
    return app


def serve(settings: Settings, engine: Engine | None = None, *, worker: bool = True) -> None:
    """Serve the API until a signal stops the process. For the parameters, see `create_app`.

    Raises
    ------
    UnsafeExposure
        The host is not loopback and no token is set.
    DamagedBundle
        A manifest cannot be read.
    """
    settings.check_exposure()
    configure_logging()
    _run_server(create_app(settings, engine, worker=worker), settings)


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
    DamagedBundle, ProviderUnavailable
        A model cannot be used. The worker does not start, because it would fail every scan.
    """
    settings.check_exposure()
    configure_logging()
    engine = engine or create_engine(settings, worker=True)
    engine.warm_up()
    _run_server(create_app(settings, engine, api=False), settings)


def create_engine(settings: Settings, *, worker: bool) -> Engine:
    """Create the engine for the bundles that the settings name. A worker runs it in a child process."""
    models_folder = str(settings.models) if settings.models else None
    arguments: dict[str, Any] = {
        "models": models_folder,
        "provider": settings.provider,
        "threads": settings.threads,
        "noncommercial": settings.allow_noncommercial,
        "gpu_batch": settings.gpu_batch,
    }
    engine = BundleEngine(**arguments)
    return SubprocessEngine(engine, "app.jobs.engine:BundleEngine", arguments) if worker else engine


def _run_server(app: FastAPI, settings: Settings) -> None:
    log.info("starting", host=settings.host, port=settings.port, provider=settings.provider)
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # uvicorn's access log contains query strings
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
