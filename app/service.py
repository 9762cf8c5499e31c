"""Parts of one process of the service: the only module that creates and connects them."""

import threading
from dataclasses import dataclass
from typing import Any, Protocol

from app.api.catalogue import Catalogue
from app.api.dependencies import Calls, Readiness, Services
from app.api.follower import JobFollower
from app.api.operations import Operations
from app.api.upload import Uploads
from app.errors import StoreUnavailable
from app.ingest.dicomweb_source import read_sources
from app.jobs.bucket import BucketStore
from app.jobs.engine import BundleEngine, Engine
from app.jobs.maintenance import StorageLimits
from app.jobs.metrics import Metrics
from app.jobs.store import Store
from app.jobs.subprocess_engine import SubprocessEngine
from app.jobs.traces import create_traces
from app.jobs.workflow import JobHooks, JobService
from app.pacs.deliverer import Deliverer
from app.pacs.metrics import DeliveryMetrics
from app.pacs.routes import read_routes
from app.settings import Settings
from app.site_profile import load_site_profiles

# Seconds until models that could not be loaded are loaded again.
RELOAD_SECONDS = 30.0


@dataclass(frozen=True)
class Roles:
    """Tasks of a process.

    Attributes
    ----------
    api : bool
        Serve the whole API. If false, serve only health and metrics.
    worker : bool
        Analyse scans, and send results to the targets of the routes.
    node : bool
        Receive series from DICOM peers.
    """

    api: bool = True
    worker: bool = True
    node: bool = False


class Companion(Protocol):
    """Threads that run beside the job service."""

    def start(self) -> None:
        """Start them. The job service runs already."""

    def stop(self) -> None:
        """Stop them before the job service."""


class Service:
    """Parts of one process.

    Parameters
    ----------
    settings : Settings
    engine : Engine or None
        Used instead of the bundles that the settings name.
    roles : Roles

    Attributes
    ----------
    services : Services
        Parts that the routes use.
    operations : Operations
    metrics : Metrics
    traces : Traces or None

    Raises
    ------
    DamagedBundle
        A manifest cannot be read.
    InvalidSettings
        The file of the routes or of the sources cannot be used.
    """

    def __init__(self, settings: Settings, engine: Engine | None, roles: Roles) -> None:
        routes = read_routes(settings.routes)
        self._engine = engine or create_engine(settings, worker=roles.worker)
        self._roles = roles
        self._drain_seconds = settings.drain_seconds
        self._stopped = threading.Event()
        self.metrics, self.traces = create_metrics(self._engine), create_traces(settings.traces)
        store = create_store(settings)
        hooks = JobHooks(routes.select if routes.routes else None, self.traces)
        limits = StorageLimits(settings.queue_limit, settings.min_free_gb, settings.keep_days, settings.keep_gb)
        self._jobs = JobService(self._engine, store, settings.database_url, self.metrics, limits, hooks)
        self._companions: list[Companion] = []
        if roles.worker:
            self._companions.append(Deliverer(routes, self._jobs, store, DeliveryMetrics(self.metrics.registry)))
        if roles.node:
            from app.pacs.node import Node

            self._companions.append(
                Node(settings, self._jobs.queue, store, self.metrics.registry, self._engine.manifests)
            )
        self.services = self._create_services(settings, store)
        self.operations = Operations(settings, self.services.calls, self.metrics, api=roles.api)

    def start(self) -> None:
        """Start the threads of all parts. The models load in a thread, so the server can answer /livez meanwhile."""
        self._jobs.start(worker=self._roles.worker)
        if self._roles.worker:
            threading.Thread(target=self._load_models, name="warm-up", daemon=True).start()
        for companion in self._companions:
            companion.start()
        self.operations.start()

    def stop(self) -> None:
        """Stop all parts. A running scan has `COUNTERPART_DRAIN_SECONDS` to finish."""
        self._stopped.set()
        for companion in self._companions:
            companion.stop()
        self._jobs.stop(self._drain_seconds)
        self.operations.stop()
        if self.traces:
            self.traces.close()

    def _create_services(self, settings: Settings, store: Store) -> Services:
        queue, calls = self._jobs.queue, Calls()
        return Services(
            settings=settings,
            engine=self._engine,
            store=store,
            queue=queue,
            readiness=Readiness(loading=self._roles.worker),
            worker_health=self._jobs.health,
            calls=calls,
            follower=JobFollower(queue, calls.query, settings.max_streams),
            uploads=Uploads(queue),
            sources=read_sources(settings.sources),
            catalogue=Catalogue(queue, store),
        )

    def _load_models(self) -> None:
        """Load the models, and try again until they can be used. Meanwhile, the worker takes no scan."""
        readiness = self.services.readiness
        while not self._stopped.is_set():
            readiness.load(self._engine)
            self._jobs.health.fault = readiness.error
            if readiness.error is None:
                return
            self._stopped.wait(RELOAD_SECONDS)


def create_engine(settings: Settings, *, worker: bool) -> Engine:
    """Create the engine for the bundles that the settings name. A worker runs it in a child process.

    Raises
    ------
    DamagedBundle
        A manifest cannot be read.
    InvalidProfile
        A site profile cannot be used.
    """
    models_folder = str(settings.models) if settings.models else None
    profiles = load_site_profiles(settings.profiles, settings.profile_key, any_scanner=settings.profile_any_scanner)
    arguments: dict[str, Any] = {
        "models": models_folder,
        "provider": settings.provider,
        "threads": settings.threads,
        "noncommercial": settings.allow_noncommercial,
        "gpu_batch": settings.gpu_batch,
        "segmentation_type": settings.seg_type,
        # Their content, which was checked here: the child process does not get the key.
        "site_profiles": profiles.model_dump(mode="json"),
    }
    engine = BundleEngine(**arguments)
    if not worker:
        return engine
    return SubprocessEngine(engine, "app.jobs.engine:BundleEngine", arguments, settings.deadline_seconds)


def create_metrics(engine: Engine) -> Metrics:
    """Create the metrics of the process, with those of its models and its child process."""
    metrics = Metrics()
    for manifest in engine.manifests:
        metrics.info.labels(manifest.id, engine.provider).set(1)
    if isinstance(engine, SubprocessEngine):
        metrics.observe_child(engine.child_pid)
    return metrics


def create_store(settings: Settings) -> Store:
    """Create the store that the settings name.

    Raises
    ------
    StoreUnavailable
        Its folder cannot be created.
    """
    try:
        if settings.bucket:
            return BucketStore(settings.bucket, settings.folder, **settings.bucket_credentials)
        return Store(settings.folder)
    except OSError as error:
        raise StoreUnavailable(
            f"The folder of the store cannot be created or written ({type(error).__name__}).",
            expected="a folder that this user may create and write to.",
            advice="Check COUNTERPART_STORE, COUNTERPART_SCRATCH and their disk.",
        ) from None
