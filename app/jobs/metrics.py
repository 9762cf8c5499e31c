"""What this process counts for Prometheus. No identifier is ever a label."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

# Seconds: from a small scan on a GPU to a long one on a busy CPU.
STAGE_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 900)


class Metrics:
    """Counters of one process, in a registry of their own: two services in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.outcomes = Counter(
            "counterpart_jobs",
            "Jobs that ended in this process, by outcome: succeeded, cancelled, or the problem's code.",
            ["outcome"],
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "counterpart_stage_seconds",
            "Wall-clock seconds of each stage of a succeeded job.",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=self.registry,
        )
        self.queued = Gauge("counterpart_queue_depth", "Jobs that wait for a worker.", registry=self.registry)
        self.oldest = Gauge(
            "counterpart_queue_age_seconds", "Age of the job that waits longest.", registry=self.registry
        )
        self.workers = Gauge("counterpart_workers", "Living workers, here and elsewhere.", registry=self.registry)
        self.running = Gauge("counterpart_jobs_running", "Jobs that are being analysed.", registry=self.registry)
        self.info = Gauge(
            "counterpart_model", "1 for each installed model.", ["model", "provider"], registry=self.registry
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
