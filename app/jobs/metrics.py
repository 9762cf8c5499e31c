"""Prometheus metrics of one process. No label ever holds an identifier.

A module of its own, because the queue, the workflow and the worker all update these metrics.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from app.errors import InternalError, OutOfMemory, StoreFull, StoreUnavailable, TookTooLong, WorkerLost
from app.jobs.faults import SERVICE_ERRORS

# Outcomes that alerts name, besides those of a job without a problem.
ALERTING_OUTCOMES = (WorkerLost, OutOfMemory, InternalError, StoreUnavailable, StoreFull, TookTooLong)
# Seconds: from a small scan on a GPU to a long scan on a busy CPU.
STAGE_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 900)
# Seconds: from a status call to an upload over a slow line, or a caller that waits for its result.
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Metrics of one process, in a registry of their own, so that two services in one process do not mix.

    Metrics "of all machines" have the same value in every process: take their maximum. All others count one process:
    take their sum.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.outcomes = Counter(
            "counterpart_jobs",
            "Jobs that ended in this process, by outcome: succeeded, cancelled, or an error code.",
            ["outcome"],
            registry=self.registry,
        )
        self.faults = Counter(
            "counterpart_service_faults",
            "Attempts that a fault of the service ended in this process, by error code. Their jobs are tried again.",
            ["code"],
            registry=self.registry,
        )
        self.webhooks = Counter(
            "counterpart_webhooks",
            "Attempts to deliver a webhook in this process, by outcome: delivered, failed (tried again), dead.",
            ["outcome"],
            registry=self.registry,
        )
        self.dead_webhooks = Gauge(
            "counterpart_webhooks_dead", "Webhooks that were given up, of all processes.", registry=self.registry
        )
        self.audit_failures = Counter(
            "counterpart_audit_failures",
            "Rows of the audit trail that this process could not write.",
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "counterpart_stage_seconds",
            "Wall-clock seconds of each stage of a succeeded job.",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=self.registry,
        )
        # An alert cannot see the first increase of a counter that begins with it.
        for outcome in ("succeeded", "cancelled", *(error.code for error in ALERTING_OUTCOMES)):
            self.outcomes.labels(outcome)
        for error in (*SERVICE_ERRORS, InternalError):
            self.faults.labels(error.code)
        self.received = Counter(
            "counterpart_scans_received", "Scans that this process accepted as new jobs.", registry=self.registry
        )
        self.request_seconds = Histogram(
            "counterpart_http_request_seconds",
            "Wall-clock seconds of a request in this process until its response began.",
            ["method", "route", "status"],
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.busy = Gauge("counterpart_worker_busy", "1 if this process analyses a scan now.", registry=self.registry)
        self.paused = Gauge(
            "counterpart_worker_paused", "1 if a fault of the service pauses this worker.", registry=self.registry
        )
        self.queued = Gauge("counterpart_queue_depth", "Jobs in the queue of all machines.", registry=self.registry)
        self.oldest = Gauge(
            "counterpart_queue_age_seconds",
            "Age of the oldest job in the queue of all machines.",
            registry=self.registry,
        )
        self.workers = Gauge("counterpart_workers", "Live workers on all machines.", registry=self.registry)
        self.running = Gauge("counterpart_jobs_running", "Jobs that run now on all machines.", registry=self.registry)
        self.deliveries = Gauge(
            "counterpart_deliveries",
            "Deliveries of results of all jobs, by target and state.",
            ["target", "state"],
            registry=self.registry,
        )
        self.delivery_age = Gauge(
            "counterpart_delivery_age_seconds",
            "Age of the oldest delivery of all jobs that is pending, by target.",
            ["target"],
            registry=self.registry,
        )
        self.info = Gauge(
            "counterpart_model", "Installed models: 1 for each.", ["model", "provider"], registry=self.registry
        )

    def observe_child(self, pid: Callable[[], int | None]) -> None:
        """Add the memory, processor time and open files of the child process that runs the inference.

        Parameters
        ----------
        pid : callable
            Returns the process id, or None if no child process runs.
        """
        ProcessCollector("counterpart_inference", lambda: pid() or "none", registry=self.registry)

    def text(self) -> bytes:
        """Return the metrics in the Prometheus exposition format."""
        return generate_latest(self.registry)
