"""DICOM SCP for verification (C-ECHO) and storage (C-STORE), on pynetdicom.

pynetdicom writes a data set in chunks into a temporary file while it arrives. The SCP answers a C-STORE with success
only after the file is in the spool and forced to disk.
"""

import logging
import secrets
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from ssl import SSLContext

import structlog
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # created at import

from app.errors import AddressUnavailable, CounterpartError, StoreFull, UploadTooLarge, error_location
from app.ingest.dicom.storage import STORAGE_CLASSES, TRANSFER_SYNTAXES, Identifiers, read_identifiers
from app.pacs.metrics import NodeMetrics
from app.pacs.spool import MIB, Sender, Spool

log = structlog.get_logger("counterpart.node")

# Statuses of C-STORE (PS3.4 B.2.3).
SUCCESS, OUT_OF_RESOURCES, WRONG_CLASS, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xA900, 0xC000
# Result, source and diagnostic of a rejection (PS3.8 9.3.4): permanent, service user, calling AE title not recognised.
UNKNOWN_CALLER = (0x01, 0x01, 0x03)
# Seconds for the negotiation, for a response, and without a byte.
ACSE_SECONDS, DIMSE_SECONDS, NETWORK_SECONDS = 30, 60, 60
MAX_ASSOCIATIONS = 20
MAX_PDU_BYTES = 1 << 17
# Bytes between two checks of the disk while a data set arrives.
CHECK_BYTES = 8 * MIB


@dataclass(frozen=True)
class Peers:
    """Callers that the node accepts.

    Attributes
    ----------
    allowed : tuple of (str, str or None)
        AE title and address of each caller. None accepts every address. If there are no entries, every caller is
        accepted.
    """

    allowed: tuple[tuple[str, str | None], ...] = ()

    def accept(self, title: str, address: str) -> bool:
        """Return whether a caller with this AE title may call from this address."""
        plain = address.removeprefix("::ffff:")
        return not self.allowed or any(title == name and host in {None, plain} for name, host in self.allowed)


@dataclass
class Transfer:
    """State of one association.

    It has a random name, its series, its instances, the bytes since the last one, and whether it is aborted.
    """

    name: str = field(default_factory=lambda: secrets.token_hex(8))
    series: set[str] = field(default_factory=set)
    instances: int = 0
    refused: int = 0
    bytes: int = 0
    checked: int = 0
    aborting: bool = False


@dataclass(frozen=True)
class ReceiverOptions:
    """Options of the SCP.

    Attributes
    ----------
    title : str
        AE title. Callers must use it.
    peers : Peers
    ssl_context : SSLContext, optional
        Context of a node that accepts TLS only.
    end_with_association : bool
        A series is complete when the association that sent it is released.
    """

    title: str
    peers: Peers = field(default_factory=Peers)
    ssl_context: SSLContext | None = None
    end_with_association: bool = False


class Receiver:
    """The SCP of the node.

    Parameters
    ----------
    options : ReceiverOptions
    spool : Spool
    metrics : NodeMetrics
    check_disk : callable
        Raises `StoreFull` if a number of further bytes would leave too little free disk space.
    """

    def __init__(
        self, options: ReceiverOptions, spool: Spool, metrics: NodeMetrics, check_disk: Callable[[int], None]
    ) -> None:
        self._options = options
        self._spool = spool
        self._metrics = metrics
        self._check_disk = check_disk
        self._transfers: dict[Association, Transfer] = {}
        self._ae = AE(options.title)
        self._ae.require_called_aet = True
        self._ae.maximum_associations = MAX_ASSOCIATIONS
        self._ae.maximum_pdu_size = MAX_PDU_BYTES
        self._ae.acse_timeout, self._ae.dimse_timeout, self._ae.network_timeout = (
            ACSE_SECONDS,
            DIMSE_SECONDS,
            NETWORK_SECONDS,
        )
        self._ae.add_supported_context(Verification)
        for sop_class in STORAGE_CLASSES:
            self._ae.add_supported_context(sop_class, list(TRANSFER_SYNTAXES))

    def start(self, host: str, port: int) -> int:
        """Accept associations, and return the port.

        Raises
        ------
        AddressUnavailable
        """
        silence_pynetdicom()
        _config.STORE_RECV_CHUNKED_DATASET = True
        tempfile.tempdir = str(self._spool.receiving)  # pynetdicom has no setting for the folder of its files
        try:
            server = self._ae.start_server(
                (host, port), block=False, ssl_context=self._options.ssl_context, evt_handlers=self._handlers()
            )
        except OSError as error:
            raise AddressUnavailable(
                f"The DICOM node cannot listen on {host}, port {port}: {error.strerror or type(error).__name__}.",
                expected="an address of this machine, and a port that no other program uses.",
                advice="Choose another COUNTERPART_NODE_HOST or COUNTERPART_NODE_PORT.",
            ) from None
        assert server is not None
        return int(server.server_address[1])

    def stop(self) -> None:
        """Abort all associations. Their senders send again what was not acknowledged."""
        self._ae.shutdown()
        tempfile.tempdir = None

    def _handlers(self) -> list[evt.EventHandlerType]:
        return [
            (evt.EVT_REQUESTED, self._check_caller),
            (evt.EVT_ACCEPTED, self._begin),
            (evt.EVT_REJECTED, lambda _: self._metrics.associations.labels("refused").inc()),
            (evt.EVT_DATA_RECV, self._limit),
            (evt.EVT_C_STORE, self._answer_store),
            (evt.EVT_RELEASED, self._release),
            (evt.EVT_CONN_CLOSE, self._end),
        ]

    # ---- associations ----

    def _check_caller(self, event: evt.Event) -> None:
        """Reject a caller that is not on the list, before the negotiation."""
        requestor = event.assoc.requestor
        assert requestor.primitive is not None
        title = requestor.primitive.calling_ae_title or ""
        if self._options.peers.accept(title.strip(), str(requestor.address)):
            return
        self._metrics.associations.labels("refused").inc()
        log.warning("association refused", aet=title, address=str(requestor.address))
        event.assoc.acse.send_reject(*UNKNOWN_CALLER)
        event.assoc.kill()

    def _begin(self, event: evt.Event) -> None:
        self._transfers[event.assoc] = Transfer()
        self._metrics.associations.labels("accepted").inc()
        # pynetdicom reports the end of a connection only if its own threads met no fault.
        threading.Thread(target=self._abort, args=(event.assoc,), daemon=True).start()

    def _release(self, event: evt.Event) -> None:
        transfer = self._close(event.assoc, "released")
        if transfer is not None and self._options.end_with_association:
            others = [other.series for other in list(self._transfers.values())]
            self._spool.end_series(transfer.series.difference(*others))

    def _end(self, event: evt.Event) -> None:
        """End an association whose connection ended before its request."""
        if event.assoc.requestor.primitive is None:
            # Its thread would wait for the request until the time-out.
            event.assoc.dul.to_user_queue.put(None)  # type: ignore[arg-type]  # as after the time-out

    def _abort(self, association: Association) -> None:
        """Close an association at the end of its thread, unless it was released, and remove its unfinished data set."""
        association.join()  # it may still store an instance, or answer a release
        if self._close(association, "aborted") is not None:
            _discard_unfinished(association)

    def _close(self, association: Association, outcome: str) -> Transfer | None:
        transfer = self._transfers.pop(association, None)
        if transfer is not None:
            try:
                self._spool.end_association(transfer.name, released=outcome == "released")
            except OSError as error:
                log.warning("end of an association not noted", **error_location(error))
            self._metrics.associations.labels(outcome).inc()
            log.info(
                "association ended",
                outcome=outcome,
                aet=association.requestor.ae_title,
                instances=transfer.instances,
                refused=transfer.refused,
                series_count=len(transfer.series),
            )
        return transfer

    def _limit(self, event: evt.Event) -> None:
        """Abort an association whose data set is too large, or that fills the disk."""
        transfer = self._transfers.get(event.assoc)
        if transfer is None or transfer.aborting:
            return
        transfer.bytes += len(event.data)
        if transfer.bytes - transfer.checked < CHECK_BYTES:
            return
        transfer.checked = transfer.bytes
        try:
            self._check_disk(0)
            if transfer.bytes <= self._spool.max_bytes:
                return
        except StoreFull:
            pass
        log.warning("association aborted", aet=event.assoc.requestor.ae_title, code=StoreFull.code)
        transfer.aborting = True
        # The call waits for this thread.
        threading.Thread(target=event.assoc.abort, daemon=True).start()

    # ---- instances ----

    def _answer_store(self, event: evt.Event) -> int:
        """Return the status of a C-STORE. Success means that the instance is on disk."""
        transfer = self._transfers[event.assoc]
        transfer.bytes = transfer.checked = 0
        status = self._store(event, transfer)
        self._metrics.instances.labels(f"{status:04X}").inc()
        if status == SUCCESS:
            transfer.instances += 1
        else:
            transfer.refused += 1
        return status

    def _store(self, event: evt.Event, transfer: Transfer) -> int:
        path: Path | None = getattr(event.request, "_dataset_path", None)
        if path is None:
            return CANNOT_UNDERSTAND
        try:
            identifiers = read_identifiers(path)
        except CounterpartError as error:
            log.warning("instance refused", code=error.code)
            self._note_refusal(event, None, transfer.name)
            return CANNOT_UNDERSTAND
        except OSError as error:
            log.warning("instance not stored", **error_location(error))
            self._note_refusal(event, None, transfer.name)
            return OUT_OF_RESOURCES
        status = self._keep(event, path, identifiers, transfer.name)
        if status == SUCCESS:
            transfer.series.add(identifiers.series_key)
        else:
            self._note_refusal(event, identifiers, transfer.name)
        return status

    def _keep(self, event: evt.Event, path: Path, identifiers: Identifiers, association: str) -> int:
        try:
            if not _matches(event, identifiers):
                return WRONG_CLASS
            self._check_disk(0)
            self._spool.add(path, identifiers, _sender(event.assoc), association)
        except (StoreFull, UploadTooLarge) as error:
            log.warning("instance refused", code=error.code)
            return OUT_OF_RESOURCES
        except OSError as error:
            log.warning("instance not stored", **error_location(error))
            return OUT_OF_RESOURCES
        return SUCCESS

    def _note_refusal(self, event: evt.Event, identifiers: Identifiers | None, association: str) -> None:
        """Note that the series misses an instance, by the UID under which its sender will send it again."""
        request = event.request
        assert isinstance(request, C_STORE)
        announced = Identifiers("", str(request.AffectedSOPInstanceUID), "", "")
        try:
            if identifiers is None:
                self._spool.refuse_unreadable(association, announced.instance_key)
            else:
                self._spool.refuse(replace(identifiers, instance=announced.instance))
        except OSError as error:
            log.warning("refusal not noted", **error_location(error))


def _sender(association: Association) -> Sender:
    requestor = association.requestor
    return Sender(requestor.ae_title.strip(), str(requestor.address).removeprefix("::ffff:"))


def _discard_unfinished(association: Association) -> None:
    """Remove the file of a data set that did not arrive completely. pynetdicom leaves it open."""
    file = getattr(association.dimse.message, "_data_set_file", None)
    if file is not None:
        file.close()
        Path(file.name).unlink(missing_ok=True)


def _matches(event: evt.Event, identifiers: Identifiers) -> bool:
    """Return whether the data set is the instance that the request announces."""
    request = event.request
    assert isinstance(request, C_STORE)
    announced = (request.AffectedSOPClassUID, request.AffectedSOPInstanceUID)
    return announced == (identifiers.sop_class, identifiers.instance)


def silence_pynetdicom() -> None:
    """Drop all logs of pynetdicom, which contain identifiers and values of patients."""
    _config.LOG_HANDLER_LEVEL = "none"
    logger = logging.getLogger("pynetdicom")
    logger.handlers = [logging.NullHandler()]
    logger.propagate = False
    logger.setLevel(logging.CRITICAL + 1)
