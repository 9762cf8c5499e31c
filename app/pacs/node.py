"""The DICOM node: its SCP, its spool and the hand-over to the queue, from start to stop."""

from collections.abc import Sequence

import structlog
from prometheus_client import CollectorRegistry

from app.analysis import AnalysisRequest
from app.errors import InvalidSettings, UnsafeExposure
from app.jobs.queue import JobQueue
from app.jobs.store import Store
from app.manifest import Manifest
from app.pacs.handover import HandOver
from app.pacs.metrics import NodeMetrics
from app.pacs.receiver import Peers, Receiver, ReceiverOptions
from app.pacs.spool import Spool
from app.pacs.tls import server_context
from app.runtime.selection import check_licence
from app.settings import PREFIX, Settings, is_loopback

log = structlog.get_logger("counterpart.node")

SPOOL = "node"


class Node:
    """The DICOM node of one process.

    Parameters
    ----------
    settings : Settings
    queue : JobQueue
    store : Store
    registry : CollectorRegistry
        Registry of the metrics of the process.
    manifests : sequence of Manifest
        Installed bundles.

    Raises
    ------
    UnsafeExposure, InvalidSettings, AddressUnavailable, NonCommercialModel
    """

    def __init__(
        self,
        settings: Settings,
        queue: JobQueue,
        store: Store,
        registry: CollectorRegistry,
        manifests: Sequence[Manifest],
    ) -> None:
        check_exposure(settings)
        request = create_request(settings, manifests)
        self._settings = settings
        metrics = NodeMetrics(registry)
        self._spool = Spool(settings.folder / SPOOL, settings.max_upload_mb, settings.max_files)
        self._receiver = Receiver(_create_options(settings), self._spool, metrics, queue.check_disk)
        self._hand_over = HandOver(self._spool, queue, store, metrics, settings.node_quiet_seconds, request)
        metrics.waiting.set_function(lambda: self._spool.count_waiting()[0])
        metrics.batches.set_function(lambda: self._spool.count_waiting()[1])
        metrics.oldest.set_function(self._spool.oldest_seconds)

    def start(self) -> None:
        """Start the hand-over, which first finishes the work of a killed process, and accept associations.

        Raises
        ------
        AddressUnavailable
        """
        settings = self._settings
        port = self._receiver.start(settings.node_host, settings.node_port)
        self._hand_over.start()
        log.info("node started", aet=settings.node_ae_title, host=settings.node_host, port=port)

    def stop(self) -> None:
        """Abort the associations and end the hand-over. Series that are not jobs yet stay on disk."""
        self._receiver.stop()
        self._hand_over.stop()
        self._spool.close()


def _create_options(settings: Settings) -> ReceiverOptions:
    certificate = settings.node_tls_certificate
    return ReceiverOptions(
        settings.node_ae_title,
        Peers(settings.accepted_peers),
        server_context(certificate, settings.node_tls_key, settings.node_tls_ca) if certificate else None,
        end_with_association=settings.node_complete == "association",
    )


def create_request(settings: Settings, manifests: Sequence[Manifest]) -> AnalysisRequest:
    """Return the options of the jobs of a node.

    Raises
    ------
    InvalidSettings
        The model is not installed. Each job would fail.
    NonCommercialModel
    """
    model = settings.node_model
    named = [manifest for manifest in manifests if model in (manifest.name, manifest.id)]
    if model is not None and not named:
        raise InvalidSettings(
            f"{PREFIX}NODE_MODEL names no installed model.",
            expected=f"one of {', '.join(manifest.id for manifest in manifests)}, or the name without its version.",
            advice="Correct the setting, or unset it.",
        )
    for manifest in named:
        check_licence(manifest, noncommercial=settings.allow_noncommercial)
    return AnalysisRequest(model=model, geometry=settings.node_geometry)


def check_exposure(settings: Settings) -> None:
    """Refuse to accept associations of other machines if the callers are not listed, or TLS lacks its certificate.

    Raises
    ------
    UnsafeExposure, InvalidSettings
    """
    if settings.node_tls_certificate is None and (settings.node_tls_key or settings.node_tls_ca):
        raise InvalidSettings(
            f"{PREFIX}NODE_TLS_KEY or {PREFIX}NODE_TLS_CA is set, and {PREFIX}NODE_TLS_CERTIFICATE is not.",
            expected="a certificate. Without it, the node would accept connections without TLS.",
            advice=f"Set {PREFIX}NODE_TLS_CERTIFICATE, or unset the others.",
        )
    if not is_loopback(settings.node_host) and not settings.node_peers:
        raise UnsafeExposure(
            f"The DICOM node is set to listen on {settings.node_host}, and {PREFIX}NODE_PEERS is not set.",
            expected="127.0.0.1, or a list of the AE titles that may call.",
            advice=f"Set {PREFIX}NODE_PEERS, for example to MODALITY@10.0.0.5.",
        )
