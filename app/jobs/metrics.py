"""Prometheus metrics of one process. No label ever holds an identifier.

A module of its own, because the queue, the workflow and the worker all update these metrics.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Seconds: from a small scan on a GPU to a long scan on a busy CPU.
STAGE_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 900)


class Metrics:
    """Metrics of one process, in a registry of their own, so that two services in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
        self.stage_seconds = Histogram(
            "counterpart_stage_seconds",
            "Wall-clock seconds of each stage of a succeeded job.",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=self.registry,
        )
        self.queued = Gauge("counterpart_queue_depth", "Jobs in the queue.", registry=self.registry)
        self.oldest = Gauge(
            "counterpart_queue_age_seconds", "Age of the oldest job in the queue.", registry=self.registry
        )
        self.workers = Gauge("counterpart_workers", "Live workers on all machines.", registry=self.registry)
        self.running = Gauge("counterpart_jobs_running", "Jobs that run now on all machines.", registry=self.registry)
        self.deliveries = Gauge(
            "counterpart_deliveries",
            "Deliveries of results of all jobs, by target and state.",
            ["target", "state"],
            registry=self.registry,
        )
        self.info = Gauge(
            "counterpart_model", "Installed models: 1 for each.", ["model", "provider"], registry=self.registry
        )

    def text(self) -> bytes:
        """Return the metrics in the Prometheus exposition format."""
        return generate_latest(self.registry)
