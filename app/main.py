"""The service put together: the only place where its parts meet."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi_offline import FastAPIOffline

from app import __version__
from app.api import events, logs, problems, scans, system
from app.api.service import Readiness, Service
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

# Seconds that open requests have at shutdown: who follows events or waits for a result would hold it up for ever.
GRACE_SECONDS = 5

DESCRIPTION = (
    "A brain scan in, a mask of what differs from its imagined healthy counterpart out. "
    f"**{RESEARCH_USE_ONLY}** Every error is `application/problem+json` with a stable `code`."
)


def create_app(settings: Settings, engine: Engine | None = None, *, api: bool = True, worker: bool = True) -> FastAPI:
    """Wire the service.

    Parameters
    ----------
    settings : Settings
    engine : Engine, optional
        In place of the bundles that the settings name.
    api : bool
        Take scans and answer for them; without, only tell of health and metrics.
    worker : bool
        Analyse scans.

    Raises
    ------
    DamagedBundle
        A manifest cannot be read.
    """
    engine = engine or make_engine(settings, worker=worker)
    metrics = Metrics()
    for manifest in engine.manifests:
        metrics.info.labels(manifest.id, engine.provider).set(1)
    store = BucketStore(settings.bucket, settings.folder) if settings.bucket else Store(settings.folder)
    limits = StorageLimits(settings.queue_limit, settings.min_free_gb, settings.keep_days, settings.keep_gb)
    jobs = JobService(engine, store, settings.database_url, metrics, limits)
    service = Service(settings, engine, store, jobs, Readiness(loading=worker))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(partial(jobs.start, worker=worker))
        if worker:
            # Beside the server, which answers /livez meanwhile.
            threading.Thread(target=service.readiness.load, args=(engine,), name="warm-up", daemon=True).start()
        yield
        await run_in_threadpool(jobs.stop, settings.drain_seconds)

    # With the pages' scripts in the package: a hospital's network has no CDN.
    app = FastAPIOffline(
        title="Counterpart", version=__version__, description=DESCRIPTION, lifespan=lifespan, redoc_url=None
    )
    app.state.service = service
    if api:
        # Before the results, whose path would take `events` for a name.
        app.include_router(events.router)
        app.include_router(scans.router)
        app.include_router(system.models)
    app.include_router(system.health)
    app.add_middleware(logs.AccessLog)
    problems.install(app)
    return app


def serve(settings: Settings, engine: Engine | None = None, *, worker: bool = True) -> None:
    """Serve until a signal says to stop; parameters as for `create_app`.

    Raises
    ------
    UnsafeExposure
        The host is not loopback and there is no token.
    DamagedBundle
        A manifest cannot be read.
    """
    settings.check_exposure()
    logs.configure()
    _run(create_app(settings, engine, worker=worker), settings)


def work(settings: Settings, engine: Engine | None = None) -> None:
    """Analyse scans that other processes take, until a signal says to stop.

    Parameters
    ----------
    settings : Settings
        Health and metrics are told on its host and port.
    engine : Engine, optional
        In place of the bundles that the settings name.

    Raises
    ------
    UnsafeExposure
        The host is not loopback and there is no token.
    DamagedBundle, ProviderUnavailable
        A model cannot be used: better no worker than one that fails every scan.
    """
    settings.check_exposure()
    logs.configure()
    engine = engine or make_engine(settings, worker=True)
    engine.warm_up()
    _run(create_app(settings, engine, api=False), settings)


def make_engine(settings: Settings, *, worker: bool) -> Engine:
    """The bundles that the settings name; a worker loads and runs them in a process of their own."""
    models = str(settings.models) if settings.models else None
    arguments: dict[str, Any] = {
        "models": models,
        "provider": settings.provider,
        "threads": settings.threads,
        "noncommercial": settings.allow_noncommercial,
        "gpu_batch": settings.gpu_batch,
    }
    known = BundleEngine(**arguments)
    return SubprocessEngine(known, "app.jobs.engine:BundleEngine", arguments) if worker else known


def _run(app: FastAPI, settings: Settings) -> None:
    log.info("starting", host=settings.host, port=settings.port, provider=settings.provider)
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # uvicorn's own prints query strings
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
