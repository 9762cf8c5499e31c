"""Prometheus metrics of the DICOM node and of the deliveries. No label ever holds an identifier of a scan."""

from prometheus_client import CollectorRegistry, Counter, Gauge

# Status of an instance that the disk or a limit refuses (PS3.4 B.2.3), as the alerts name it.
OUT_OF_RESOURCES = "A700"


class NodeMetrics:
    """Metrics of the DICOM node.

    Parameters
    ----------
    registry : CollectorRegistry
        Registry of the process.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.associations = Counter(
            "counterpart_node_associations",
            "Associations of the DICOM node, by outcome: accepted, refused, released or aborted.",
            ["outcome"],
            registry=registry,
        )
        self.instances = Counter(
            "counterpart_node_instances",
            "Instances that were sent to the DICOM node, by status of the response as four hexadecimal digits.",
            ["status"],
            registry=registry,
        )
        # An alert cannot see the first increase of a counter that begins with it.
        self.instances.labels(OUT_OF_RESOURCES)
        self.series = Counter(
            "counterpart_node_series",
            "Series that were handed over: new, late (instances after the first job) or repeated (no new job).",
            ["kind"],
            registry=registry,
        )
        self.waiting = Gauge("counterpart_node_series_waiting", "Series that are not complete.", registry=registry)
        self.batches = Gauge(
            "counterpart_node_series_delayed", "Complete series that are not jobs yet.", registry=registry
        )
        self.oldest = Gauge(
            "counterpart_node_series_age_seconds",
            "Seconds since the last image of the oldest series that is not a job yet.",
            registry=registry,
        )


class DeliveryMetrics:
    """Metrics of the deliveries.

    Parameters
    ----------
    registry : CollectorRegistry
        Registry of the process.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.attempts = Counter(
            "counterpart_delivery_attempts",
            "Attempts of this process to send a result to a target, by outcome: sent, or an error code.",
            ["target", "outcome"],
            registry=registry,
        )
