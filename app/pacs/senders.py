"""Senders of one DICOM file to a target: by C-STORE (pynetdicom) or by STOW-RS (dicomweb-client).

A file is read under `silence_libraries`, and sent without it: only one thread of a process at a time may be inside, and
a target can take a minute. `app.api.server.configure_logging` drops the text of warnings of the whole process.
"""

from pathlib import Path

import pydicom
import requests
from dicomweb_client import DICOMwebClient
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # created at import

from app.dicom_attributes import silence_libraries
from app.pacs.receiver import silence_pynetdicom
from app.pacs.routes import DimseTarget, StowTarget, Target
from app.pacs.tls import client_context

# Seconds for a connection, and for each answer. Their sum is shorter than a claim (`app.jobs.deliveries`).
CONNECT_SECONDS, ANSWER_SECONDS = 15, 60
# Statuses of C-STORE that mean that the PACS has the object: success, warnings (PS3.4 B.2.3), duplicate (PS3.7 C.5).
STORED = frozenset({0x0000, 0xB000, 0xB006, 0xB007, 0x0111})


class NotSent(Exception):
    """A target did not confirm that it stored an object.

    Attributes
    ----------
    code : str
        Cause: `unreachable`, `rejected`, `unsupported`, `aborted`, `redirected`, `unconfirmed`, or the status of the
        answer, such as `0xA700` or `http_503`.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def send(path: Path, target: Target) -> None:
    """Send a DICOM file, and return when the target has confirmed that it stored the object.

    Raises
    ------
    NotSent
    """
    if isinstance(target, DimseTarget):
        send_c_store(path, target)
    else:
        send_stow(path, target)


def send_c_store(path: Path, target: DimseTarget) -> None:
    """Send a DICOM file by C-STORE. The association proposes only the SOP class of the file.

    Raises
    ------
    NotSent
    """
    with silence_libraries():
        dataset = pydicom.dcmread(path)
    entity = _create_entity(target)
    entity.dimse_timeout = entity.network_timeout = ANSWER_SECONDS
    # Every SCP supports implicit VR (PS3.5 10.1). pynetdicom converts the object if only that is accepted.
    syntaxes = list(
        dict.fromkeys((dataset.file_meta.TransferSyntaxUID, ExplicitVRLittleEndian, ImplicitVRLittleEndian))
    )
    for syntax in syntaxes if not dataset.file_meta.TransferSyntaxUID.is_compressed else syntaxes[:1]:
        entity.add_requested_context(dataset.SOPClassUID, syntax)
    association = _associate(entity, target)
    try:
        answer = association.send_c_store(dataset)
    except ValueError:  # no presentation context was accepted
        raise NotSent("unsupported") from None
    finally:
        if association.is_established:
            association.release()
    if "Status" not in answer:
        raise NotSent("aborted")
    if answer.Status not in STORED:
        raise NotSent(f"0x{answer.Status:04X}")


def echo(target: DimseTarget, seconds: float) -> None:
    """Send a C-ECHO. A target that accepts the association, but not this service, is `unsupported`.

    Raises
    ------
    NotSent
    InvalidSettings
        The files for TLS cannot be used.
    """
    entity = _create_entity(target)
    entity.acse_timeout = entity.connection_timeout = entity.dimse_timeout = entity.network_timeout = seconds
    entity.add_requested_context(Verification)
    association = _associate(entity, target)
    answer = association.send_c_echo()
    association.release()
    if "Status" not in answer:
        raise NotSent("aborted")
    if answer.Status:
        raise NotSent(f"0x{answer.Status:04X}")


def _create_entity(target: DimseTarget) -> AE:
    silence_pynetdicom()
    entity = AE(target.calling_ae_title)
    entity.acse_timeout = entity.connection_timeout = CONNECT_SECONDS
    return entity


def _associate(entity: AE, target: DimseTarget) -> Association:
    tls = (client_context(target.certificate, target.key, target.ca), target.host) if target.tls else None
    association = entity.associate(target.host, target.port, ae_title=target.ae_title, tls_args=tls)
    if not association.is_established:
        raise NotSent(_explain(association))
    return association


def _explain(association: Association) -> str:
    """Return the reason why an association was not established."""
    if association.is_rejected:
        return "rejected"
    if association.acceptor.primitive is not None:
        return "unsupported"
    return "unreachable"


def send_stow(path: Path, target: StowTarget) -> None:
    """Send a DICOM file by STOW-RS.

    Raises
    ------
    NotSent
    """
    with silence_libraries():
        dataset = pydicom.dcmread(path)
    with requests.Session() as session:
        session.trust_env = False  # no proxy and no .netrc of the environment
        session.max_redirects = 0
        session.verify = str(target.ca) if target.ca else True
        if target.certificate:
            session.cert = (str(target.certificate), str(target.key)) if target.key else str(target.certificate)
        headers = {}
        if target.token_file:
            headers["Authorization"] = f"Bearer {target.token_file.read_text().strip()}"
        client = DICOMwebClient(
            str(target.url).rstrip("/"), session, headers=headers, timeout=(CONNECT_SECONDS, ANSWER_SECONDS)
        )
        client.set_http_retry_params(retry=False)
        try:
            answer = client.store_instances([dataset])
        except requests.HTTPError as error:
            raise NotSent("http" if error.response is None else f"http_{error.response.status_code}") from None
        except requests.TooManyRedirects:
            raise NotSent("redirected") from None
        except requests.RequestException:
            raise NotSent("unreachable") from None
    failed = answer.get("FailedSOPSequence")
    if failed:
        raise NotSent(f"0x{failed[0].get('FailureReason', 0x0110):04X}")
    stored = {item.get("ReferencedSOPInstanceUID") for item in answer.get("ReferencedSOPSequence", [])}
    if dataset.SOPInstanceUID not in stored:
        raise NotSent("unconfirmed")
