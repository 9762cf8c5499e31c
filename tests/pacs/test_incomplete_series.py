"""A series of which images were refused, or whose transfer broke off, becomes a job that says so."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom.dataset import FileDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pynetdicom import AE
from pynetdicom.association import Association

from app.errors import StoreFull
from app.pacs import spool
from app.pacs.handover import INTERRUPTED_NOTE, REFUSED_NOTE
from app.pacs.receiver import Receiver, ReceiverOptions
from tests.pacs.support import HandOverCase, hand_over_case, make_slices, read_note

SUCCESS, OUT_OF_RESOURCES, WRONG_CLASS, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xA900, 0xC000


class Node:
    """A receiver and a hand-over on the same spool."""

    def __init__(self, case: HandOverCase) -> None:
        self.case = case
        self.full = False
        self.receiver = Receiver(ReceiverOptions("NODE"), case.spool, case.metrics, self.check_disk)
        self.port = self.receiver.start("127.0.0.1", 0)

    def check_disk(self, _size: int) -> None:
        if self.full:
            raise StoreFull("Found.", expected="expected.", advice="Advice.")

    def associate(self) -> Association:
        entity = AE("SCANNER")
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 30
        entity.add_requested_context(MRImageStorage, ExplicitVRLittleEndian)
        return entity.associate("127.0.0.1", self.port, ae_title="NODE")

    def send(self, *datasets: FileDataset, full: bool = False) -> list[int]:
        """Send images in one association, which is released."""
        self.full = full
        association = self.associate()
        statuses = [association.send_c_store(dataset).Status for dataset in datasets]
        self.end(association.release)
        self.full = False
        return statuses

    def abort(self, *datasets: FileDataset) -> None:
        """Send images in one association, which is then aborted."""
        association = self.associate()
        assert all(association.send_c_store(dataset).Status == SUCCESS for dataset in datasets)
        self.end(association.abort)

    def end(self, end: Callable[[], None]) -> None:
        """End an association, and wait until the node has noted that."""
        before = self.count_ended()
        end()
        deadline = time.monotonic() + 30
        while self.count_ended() == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def count_ended(self) -> float:
        associations = self.case.metrics.associations
        return float(sum(associations.labels(outcome)._value.get() for outcome in ("released", "aborted")))

    def hand_over(self) -> list[str]:
        """Hand over, and return the notes of the new jobs."""
        before = set(self.case.jobs())
        self.case.hand_over.run_once()
        return [read_note(job) for job in self.case.jobs() if job not in before]

    def restart(self) -> None:
        """Kill the node, as far as the spool can see, and start it again."""
        self.receiver._transfers.clear()  # a dead process notes nothing
        self.receiver.stop()
        self.case.restart()
        self.receiver = Receiver(ReceiverOptions("NODE"), self.case.spool, self.case.metrics, self.check_disk)
        self.port = self.receiver.start("127.0.0.1", 0)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with hand_over_case(tmp_path) as case:
        running = Node(case)
        yield running
        running.receiver.stop()


def marks(node: Node) -> list[str]:
    """Return the folders of all marks in the spool."""
    folders = (node.case.spool.root / name for name in ("refused", "transfers"))
    return [path.parent.parent.name for folder in folders for path in folder.glob("*/*")]


def test_refused_images_are_in_the_note_of_the_job(node: Node) -> None:
    slices = make_slices()
    assert node.send(slices[0]) == [SUCCESS]
    assert node.send(*slices[1:3], full=True) == [OUT_OF_RESOURCES] * 2
    assert node.send(slices[3]) == [SUCCESS]
    assert node.hand_over() == [REFUSED_NOTE.format(count=2)]


def test_images_that_were_refused_before_the_first_one_arrived_count(node: Node) -> None:
    slices = make_slices()
    node.send(slices[0], full=True)
    node.send(*slices[1:])
    assert node.hand_over() == [REFUSED_NOTE.format(count=1)]


def test_images_beyond_the_limit_of_a_series_are_in_the_note(node: Node) -> None:
    node.case.spool._max_files = 3
    assert node.send(*make_slices()) == [SUCCESS] * 3 + [OUT_OF_RESOURCES]
    assert node.hand_over() == [REFUSED_NOTE.format(count=1)]


def test_an_image_whose_header_cannot_be_read_counts_for_the_series_of_its_association(node: Node) -> None:
    slices = make_slices()
    series = slices[2].SeriesInstanceUID
    del slices[2].SeriesInstanceUID
    assert node.send(*slices) == [SUCCESS, SUCCESS, CANNOT_UNDERSTAND, SUCCESS]
    assert node.hand_over() == [REFUSED_NOTE.format(count=1)]
    slices[2].SeriesInstanceUID = series
    node.send(*slices)
    (note,) = node.hand_over()
    assert "refused" not in note
    assert "analysed it without 1 of these images" in note


def test_a_sender_that_repeats_a_refused_image_does_not_delay_its_series(node: Node) -> None:
    slices = make_slices()
    node.send(*slices[:3])
    node.send(slices[3], full=True)
    before = dict(node.case.spool._arrivals)
    node.send(slices[3], full=True)
    assert node.case.spool._arrivals == before


def test_a_data_set_of_another_instance_counts_until_the_announced_one_arrives(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = make_slices()
    uid, encode = slices[0].SOPInstanceUID, Association._get_valid_context

    def change(self: Association, *args: object, **options: object) -> object:
        slices[0].SOPInstanceUID = generate_uid()  # after the request has the first UID
        return encode(self, *args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Association, "_get_valid_context", change)
        assert node.send(slices[0]) == [WRONG_CLASS]
    assert marks(node) == ["refused"]
    slices[0].SOPInstanceUID = uid
    node.send(*slices)
    assert node.hand_over() == [""]


def test_a_refused_image_that_arrives_later_is_not_in_the_note(node: Node) -> None:
    slices = make_slices()
    node.send(*slices, full=True)
    node.send(*slices[:2])
    node.send(*slices[2:])
    assert node.hand_over() == [""]
    assert marks(node) == []


def test_an_image_that_is_refused_but_arrived_before_is_not_in_the_note(node: Node) -> None:
    slices = make_slices()
    node.send(*slices)
    node.send(*slices, full=True)
    assert node.hand_over() == [""]
    node.send(*slices, full=True)
    assert marks(node) == []


def test_a_refused_image_stays_in_the_notes_until_it_arrives(node: Node) -> None:
    """Late images become a new job, and one of the refused images is still missing."""
    slices = make_slices()
    node.send(*slices[2:], full=True)
    node.send(*slices[:2])
    assert node.hand_over() == [REFUSED_NOTE.format(count=2)]
    node.send(slices[2])
    (note,) = node.hand_over()
    assert note.startswith(REFUSED_NOTE.format(count=1) + " The series arrived in parts.")
    node.send(slices[3])
    (note,) = node.hand_over()
    assert note.startswith("The series arrived in parts.")


def test_a_refusal_restarts_the_quiet_time(node: Node) -> None:
    slices = make_slices()
    node.send(slices[0])
    (key,) = node.case.spool._arrivals
    node.case.spool._arrivals[key] -= 100
    assert node.case.spool.quiet_series(50) == [key]
    node.send(slices[1], full=True)
    assert node.case.spool.quiet_series(50) == []


def test_an_aborted_transfer_is_in_the_note_of_the_job(node: Node) -> None:
    node.abort(*make_slices()[:2])
    assert node.hand_over() == [INTERRUPTED_NOTE]


def test_a_sender_that_hangs_is_in_the_note_of_the_job(node: Node) -> None:
    node.receiver._ae.network_timeout = 1
    association = node.associate()
    association.send_c_store(make_slices()[0])
    assert node.hand_over() == []  # its connection has not ended
    node.end(lambda: None)
    assert node.hand_over() == [INTERRUPTED_NOTE]


def test_an_abort_restarts_the_quiet_time(node: Node) -> None:
    association = node.associate()
    association.send_c_store(make_slices()[0])
    (key,) = node.case.spool._arrivals
    node.case.spool._arrivals[key] -= 100
    node.end(association.abort)
    assert node.case.spool.quiet_series(50) == []
    assert node.case.spool.quiet_series(0) == [key]


def test_a_transfer_that_ended_with_the_process_is_in_the_note(node: Node) -> None:
    association = node.associate()
    association.send_c_store(make_slices()[0])
    node.restart()
    assert node.hand_over() == [INTERRUPTED_NOTE]


def test_every_waiting_series_of_an_aborted_association_is_marked(node: Node) -> None:
    node.abort(*make_slices("one"), make_slices("two")[0])
    assert node.hand_over() == [INTERRUPTED_NOTE] * 2


def test_a_series_that_is_sent_again_completely_has_no_note(node: Node) -> None:
    node.abort(*make_slices()[:2])
    node.send(*make_slices())
    assert node.hand_over() == [""]
    assert marks(node) == []


def test_the_rest_of_a_series_after_an_abort_keeps_the_note(node: Node) -> None:
    """The sender may have left out the image at which its association was aborted."""
    slices = make_slices()
    node.abort(*slices[:2])
    node.send(slices[3])
    assert node.hand_over() == [INTERRUPTED_NOTE]
    node.send(slices[2])
    (note,) = node.hand_over()
    assert note.startswith(INTERRUPTED_NOTE + " The series arrived in parts.")
    node.send(*slices)
    assert node.hand_over() == [""]
    node.send(*slices)
    assert node.hand_over() == []


def test_a_job_without_a_note_is_no_answer_to_an_incomplete_series(node: Node) -> None:
    slices = make_slices()
    node.send(*slices[:3])
    assert node.hand_over() == [""]
    for expected in ([REFUSED_NOTE.format(count=1)], []):
        node.send(slices[3], full=True)
        node.send(*slices[:3])
        assert node.hand_over() == expected


def test_a_sender_that_repeats_a_series_before_its_broken_connection_ends_causes_no_note(node: Node) -> None:
    slices = make_slices()
    broken = node.associate()
    broken.send_c_store(slices[0])
    node.send(*slices)
    node.end(broken.abort)
    assert node.hand_over() == [""]


def test_a_series_is_not_handed_over_while_an_open_association_sends_it(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    association = node.associate()
    association.send_c_store(make_slices("one")[0])
    assert node.hand_over() == []
    association.send_c_store(make_slices("two")[0])  # the sender has gone on
    assert node.hand_over() == [""]
    monkeypatch.setattr(spool, "MAX_HOLD_SECONDS", 0)
    assert node.hand_over() == [INTERRUPTED_NOTE]
    association.release()


def test_senders_that_mix_series_cause_no_notes(node: Node) -> None:
    pairs = zip(make_slices("one"), make_slices("two"), strict=True)
    node.send(*(dataset for pair in pairs for dataset in pair))
    assert node.hand_over() == [""] * 2
    assert marks(node) == []


def test_marks_are_removed_with_the_record_of_the_series(node: Node) -> None:
    slices = make_slices()
    node.send(slices[2], full=True)
    node.abort(*slices[:2])
    node.hand_over()
    assert sorted(marks(node)) == ["refused", "transfers"]
    node.case.service.queue.erase(node.case.jobs()[0])
    node.case.hand_over._last_sweep = float("-inf")
    node.hand_over()
    assert marks(node) == []


def test_marks_of_a_series_of_which_nothing_arrived_are_removed(node: Node) -> None:
    slices = make_slices()
    node.send(slices[0], full=True)
    (folder,) = (node.case.spool.root / "refused").iterdir()
    node.case.spool.remove_stale()
    assert marks(node) == ["refused"]
    old = time.time() - 2 * spool.STALE_SECONDS
    os.utime(folder, (old, old))
    node.send(slices[1])
    node.case.spool.remove_stale()
    assert marks(node) == ["refused"]  # an instance of the series waits
    node.hand_over()
    node.case.spool.remove_stale()
    assert marks(node) == ["refused"]  # the series is a job
    node.case.spool.forget(folder.name)
    node.send(slices[0], full=True)
    os.utime(folder, (old, old))
    node.case.spool.remove_stale()
    assert not folder.exists()
