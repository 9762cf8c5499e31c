"""The SCP of the node, called by pynetdicom and by dcmtk."""

import logging
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pydicom
import pytest
from prometheus_client import CollectorRegistry
from pydicom.dataset import FileDataset
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from app.errors import StoreFull
from app.ingest.dicom.storage import STORAGE_CLASSES, TRANSFER_SYNTAXES, Identifiers
from app.pacs import receiver
from app.pacs.metrics import NodeMetrics
from app.pacs.receiver import Peers, Receiver, ReceiverOptions
from app.pacs.spool import Sender, Spool
from app.pacs.tls import client_context, server_context
from tests.pacs.certificates import Authority
from tests.pacs.support import make_slices
from tests.support.dicom import SECRET
from tests.support.external_tools import require_tool

TITLE = "NODE"


class RunningNode:
    """A receiver on a free port, with its spool."""

    def __init__(self, folder: Path, options: ReceiverOptions) -> None:
        self.spool = Spool(folder / "node", 10, 100)
        self.full = False
        self.metrics = NodeMetrics(CollectorRegistry())
        self.receiver = Receiver(options, self.spool, self.metrics, self.check_disk)
        self.port = self.receiver.start("127.0.0.1", 0)

    def check_disk(self, _size: int) -> None:
        if self.full:
            raise StoreFull("Found.", expected="expected.", advice="Advice.")

    def stop(self) -> None:
        self.receiver.stop()
        self.spool.close()

    def files(self) -> list[Path]:
        """Return the instances that the node keeps."""
        return sorted(path for path in (self.spool.root / "series").rglob("*") if path.is_file())

    def associate(
        self, *sop_classes: str, title: str = "SCANNER", called: str = TITLE, tls: ssl.SSLContext | None = None
    ) -> Association:
        entity = AE(title)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 30
        entity.add_requested_context(Verification)
        for sop_class in sop_classes or (MRImageStorage,):
            entity.add_requested_context(sop_class, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
        return entity.associate(
            "127.0.0.1", self.port, ae_title=called, tls_args=(tls, "127.0.0.1") if tls is not None else None
        )

    def store(self, *datasets: FileDataset) -> list[int]:
        """Send instances in one association, and return the statuses."""
        association = self.associate(*{dataset.SOPClassUID for dataset in datasets})
        try:
            return [association.send_c_store(dataset).Status for dataset in datasets]
        finally:
            association.release()


StartNode = Callable[..., RunningNode]


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[StartNode]:
    nodes: list[RunningNode] = []

    def start(**options: object) -> RunningNode:
        nodes.append(RunningNode(tmp_path / str(len(nodes)), ReceiverOptions(TITLE, **options)))  # type: ignore[arg-type]
        return nodes[-1]

    yield start
    for running in nodes:
        running.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_echo_and_store(start_node: StartNode) -> None:
    node = start_node()
    association = node.associate()
    assert association.send_c_echo().Status == 0
    association.release()
    slices = make_slices()
    assert node.store(*slices) == [0, 0, 0, 0]
    stored = [pydicom.dcmread(path) for path in node.files()]
    assert sorted(d.SOPInstanceUID for d in stored) == sorted(d.SOPInstanceUID for d in slices)
    by_uid = {d.SOPInstanceUID: d for d in slices}
    assert all(d == by_uid[d.SOPInstanceUID] for d in stored)
    assert node.metrics.instances.labels("0000")._value.get() == 4
    wait_until(lambda: node.metrics.associations.labels("released")._value.get() == 2)


def test_dcmtk_sends_with_its_default_contexts(start_node: StartNode, tmp_path: Path) -> None:
    node = start_node()
    paths = []
    for number, dataset in enumerate(make_slices()):
        paths.append(tmp_path / f"{number}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    require_tool("echoscu")("-aec", TITLE, "127.0.0.1", node.port)
    require_tool("storescu")("-aec", TITLE, "127.0.0.1", node.port, *paths)
    assert len(node.files()) == 4
    assert node.spool.read_senders(node.files()[0].parent.name) == (Sender("STORESCU", "127.0.0.1"),)


def test_every_storage_class_is_accepted_in_every_transfer_syntax(start_node: StartNode) -> None:
    node = start_node()
    for sop_class in STORAGE_CLASSES:
        entity = AE("SCANNER")
        for syntax in TRANSFER_SYNTAXES:
            entity.add_requested_context(sop_class, syntax)
        association = entity.associate("127.0.0.1", node.port, ae_title=TITLE)
        accepted = {context.transfer_syntax[0] for context in association.accepted_contexts}
        association.release()
        assert accepted == set(TRANSFER_SYNTAXES), sop_class.name


def test_one_association_too_many_is_rejected(start_node: StartNode) -> None:
    node = start_node()
    associations = [node.associate() for _ in range(receiver.MAX_ASSOCIATIONS)]
    assert all(association.is_established for association in associations)
    rejected = node.associate()
    assert rejected.is_rejected
    primitive = rejected.acceptor.primitive
    assert primitive is not None
    # Rejected-transient by the presentation layer: local limit exceeded (PS3.8 table 9-21).
    assert (primitive.result, primitive.result_source, primitive.diagnostic) == (2, 3, 2)
    associations.pop().release()
    wait_until(lambda: node.associate().is_established)
    for association in associations:
        association.abort()


def test_largest_pdu(start_node: StartNode) -> None:
    association = start_node().associate()
    assert association.acceptor.maximum_length == receiver.MAX_PDU_BYTES
    association.release()


@pytest.mark.parametrize(("limit", "request_sent"), [("ACSE_SECONDS", False), ("NETWORK_SECONDS", True)])
def test_silent_callers_are_left_in_time(
    start_node: StartNode,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    request_sent: bool,  # noqa: FBT001
) -> None:
    """A caller that never requests an association, and one that sends nothing after its association began."""
    monkeypatch.setattr(receiver, limit, 1)
    node = start_node()
    if request_sent:
        association = node.associate()
        assert association.is_established
        wait_until(lambda: association.is_aborted)
        return
    with socket.create_connection(("127.0.0.1", node.port), timeout=30) as silent:
        assert silent.recv(1) in {b"", bytes([7])}  # closed, or an A-ABORT


def test_other_storage_classes_are_not_accepted(start_node: StartNode) -> None:
    association = start_node().associate(SecondaryCaptureImageStorage)
    assert [context.abstract_syntax for context in association.accepted_contexts] == [Verification]
    association.release()


@pytest.mark.parametrize(
    ("allowed", "title", "called", "accepted"),
    [
        ((), "ANY", TITLE, True),
        ((), "ANY", "OTHER", False),
        ((("SCANNER", None),), "SCANNER", TITLE, True),
        ((("SCANNER", None),), "OTHER", TITLE, False),
        ((("SCANNER", "127.0.0.1"),), "SCANNER", TITLE, True),
        ((("SCANNER", "10.0.0.1"),), "SCANNER", TITLE, False),
        ((("SCANNER", "10.0.0.1"), ("SCANNER", "127.0.0.1")), "SCANNER", TITLE, True),
    ],
)
def test_only_listed_callers_are_accepted(
    start_node: StartNode,
    allowed: tuple[tuple[str, str | None], ...],
    title: str,
    called: str,
    accepted: bool,  # noqa: FBT001
) -> None:
    node = start_node(peers=Peers(allowed))
    association = node.associate(title=title, called=called)
    assert association.is_established == accepted
    assert association.is_rejected != accepted
    if accepted:
        association.release()
    else:
        reason = association.acceptor.primitive
        assert reason is not None
        diagnostic = 7 if called != TITLE else 3
        assert (reason.result, reason.result_source, reason.diagnostic) == (1, 1, diagnostic)


def test_an_instance_is_not_acknowledged_if_it_is_not_on_disk(
    start_node: StartNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start_node()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(node.spool, "add", fail)
        assert node.store(*make_slices()[:1]) == [0xA700]
    with monkeypatch.context() as patch:
        patch.setattr("app.pacs.spool.sync_to_disk", fail)
        assert node.store(*make_slices()[:1]) == [0xA700]
    assert node.store(*make_slices()[:1]) == [0]


def test_limits_are_out_of_resources(start_node: StartNode) -> None:
    node = start_node()
    node.full = True
    assert node.store(*make_slices()) == [0xA700] * 4
    assert node.files() == []
    node.full = False
    assert node.store(*make_slices(count=101)) == [0] * 100 + [0xA700]
    assert len(node.files()) == 100


def test_a_data_set_that_fills_the_disk_is_aborted(start_node: StartNode) -> None:
    node = start_node()
    (large,) = make_slices(count=1)
    large.Rows, large.Columns = 4096, 2048
    large.PixelData = bytes(2 * 4096 * 2048)
    node.full = True
    association = node.associate()
    assert "Status" not in association.send_c_store(large)
    wait_until(lambda: association.is_aborted)
    wait_until(lambda: not list(node.spool.receiving.iterdir()))
    assert node.files() == []
    wait_until(lambda: node.metrics.associations.labels("aborted")._value.get() == 1)


def test_a_data_set_of_another_instance_is_refused(start_node: StartNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node = start_node()
    (dataset,) = make_slices(count=1)
    association = node.associate()
    encode = Association._get_valid_context

    def change(self: Association, *args: object, **options: object) -> object:
        dataset.SOPInstanceUID = generate_uid()  # after the request has the first UID
        return encode(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Association, "_get_valid_context", change)
    assert association.send_c_store(dataset).Status == 0xA900
    association.release()
    assert node.files() == []


@pytest.mark.parametrize("keyword", ["SeriesInstanceUID", "StudyInstanceUID"])
def test_an_instance_without_its_series_is_refused(start_node: StartNode, keyword: str) -> None:
    node = start_node()
    (dataset,) = make_slices(count=1)
    delattr(dataset, keyword)
    assert node.store(dataset) == [0xC000]
    assert node.files() == []


def test_data_sets_arrive_in_the_spool_and_not_in_the_temporary_folder(
    start_node: StartNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, seen = start_node(), []
    add = node.spool.add

    def record(path: Path, identifiers: Identifiers, sender: Sender, association: str) -> None:
        seen.append(path.parent)
        add(path, identifiers, sender, association)

    monkeypatch.setattr(node.spool, "add", record)
    assert node.store(*make_slices()[:2]) == [0, 0]
    assert seen == [node.spool.receiving] * 2
    assert list(node.spool.receiving.iterdir()) == []
    node.receiver.stop()
    assert tempfile.gettempdir() != str(node.spool.receiving)


@pytest.mark.parametrize("ends", [True, False])
def test_a_series_may_end_with_its_association(start_node: StartNode, ends: bool) -> None:  # noqa: FBT001
    node = start_node(end_with_association=ends)
    node.store(*make_slices())
    wait_until(lambda: node.metrics.associations.labels("released")._value.get() == 1)
    time.sleep(0.1)
    assert bool(node.spool.quiet_series(1e6)) == ends


def test_a_series_does_not_end_while_another_association_sends_it(start_node: StartNode) -> None:
    node = start_node(end_with_association=True)
    association = node.associate()
    assert association.send_c_store(make_slices()[0]).Status == 0
    node.store(*make_slices()[1:])
    wait_until(lambda: node.metrics.associations.labels("released")._value.get() == 1)
    time.sleep(0.1)
    assert node.spool.quiet_series(1e6) == []
    association.release()
    wait_until(lambda: len(node.spool.quiet_series(1e6)) == 1)


def test_an_aborted_association_does_not_end_its_series(start_node: StartNode) -> None:
    node = start_node(end_with_association=True)
    association = node.associate()
    assert association.send_c_store(make_slices()[0]).Status == 0
    association.abort()
    wait_until(lambda: node.metrics.associations.labels("aborted")._value.get() == 1)
    assert node.spool.quiet_series(1e6) == []
    assert len(node.files()) == 1


def test_no_log_contains_patient_data(
    start_node: StartNode, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    node = start_node()
    slices = make_slices()
    del slices[0].SeriesInstanceUID
    assert node.store(*slices) == [0xC000, 0, 0, 0]
    wait_until(lambda: node.metrics.associations.labels("released")._value.get() == 1)
    output = caplog.text + "".join(capfd.readouterr())
    assert SECRET not in output
    assert slices[1].SOPInstanceUID not in output


def test_tls_needs_the_certificates_of_both_sides(start_node: StartNode, tmp_path: Path) -> None:
    authority, stranger = Authority.create(tmp_path / "ca"), Authority.create(tmp_path / "other")
    node = start_node(ssl_context=server_context(*authority.issue("node"), authority.path))
    assert not node.associate().is_established
    assert not node.associate(tls=client_context(None, None, authority.path)).is_established
    assert not node.associate(tls=client_context(*stranger.issue("caller"), authority.path)).is_established
    # The caller trusts another authority than that of the node.
    assert not node.associate(tls=client_context(*authority.issue("caller"), stranger.path)).is_established
    association = node.associate(tls=client_context(*authority.issue("caller"), authority.path))
    assert association.send_c_store(make_slices()[0]).Status == 0
    association.release()


def test_dcmtk_sends_over_tls(start_node: StartNode, tmp_path: Path) -> None:
    echoscu, storescu = require_tool("echoscu"), require_tool("storescu")
    if "+tls" not in echoscu("--help", check=False):
        pytest.skip("this dcmtk has no TLS: install one that was built with OpenSSL")
    authority, stranger = Authority.create(tmp_path / "ca"), Authority.create(tmp_path / "other")
    node = start_node(ssl_context=server_context(*authority.issue("node"), authority.path))
    certificate, key = authority.issue("scanner")
    trust = ("+cf", authority.path, "-aec", TITLE, "127.0.0.1", node.port)
    echoscu("+tls", key, certificate, *trust)
    (dataset,) = make_slices(count=1)
    dataset.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    storescu("+tls", key, certificate, *trust, tmp_path / "one.dcm")
    assert len(node.files()) == 1
    unknown_certificate, unknown_key = stranger.issue("scanner")
    for refused in (["+tls", unknown_key, unknown_certificate], ["+tla"], []):
        output = echoscu(*refused, *(trust if refused else trust[2:]), "-ta", 10, "-to", 10, check=False)
        assert "Association Request Failed" in output, refused
    assert len(node.files()) == 1


def test_a_silent_tls_caller_delays_no_other(start_node: StartNode, tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "ca")
    node = start_node(ssl_context=server_context(*authority.issue("node"), None))
    with socket.create_connection(("127.0.0.1", node.port)):
        begun = time.monotonic()
        association = node.associate(tls=client_context(None, None, authority.path))
        assert association.is_established
        assert time.monotonic() - begun < 10
        association.release()
    begun = time.monotonic()
    wait_until(lambda: not node.receiver._ae.active_associations)
    assert time.monotonic() - begun < 10
