"""Received instances on disk: arrival, limits, and what a restart finds."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import AddressUnavailable, UploadTooLarge
from app.ingest.dicom.storage import Identifiers
from app.pacs.spool import HandedSeries, Sender, Spool


def receive(spool: Spool, content: bytes, instance: str = "1", series: str = "1.2.5") -> Identifiers:
    path = spool.receiving / "x.dcm"
    path.write_bytes(content)
    identifiers = Identifiers("1.2", instance, "1.2.4", series)
    spool.add(path, identifiers, Sender("SCANNER", "10.0.0.5"))
    return identifiers


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    opened = Spool(tmp_path / "node", 1, 3)
    yield opened
    opened.close()


def test_a_series_is_complete_when_it_is_quiet(spool: Spool) -> None:
    key = receive(spool, b"one").series_key
    assert spool.quiet_series(60) == []
    assert spool.quiet_series(0) == [key]
    spool.end_series([key, "unknown"])
    assert spool.quiet_series(1e9) == [key]
    receive(spool, b"two", "2")
    assert spool.quiet_series(1e9) == []


def test_instances_that_come_after_the_take_wait_for_the_next_batch(spool: Spool) -> None:
    key = receive(spool, b"one").series_key
    batch = spool.take(key)
    receive(spool, b"two", "2")
    assert [path.read_bytes() for path in batch.files] == [b"one"]
    assert [path.read_bytes() for path in spool.take(key).files] == [b"two"]
    assert [b.series for b in spool.batches()] == [key, key]


def test_an_instance_that_is_sent_again_replaces_the_first(spool: Spool) -> None:
    for _ in range(5):
        key = receive(spool, b"again").series_key
    receive(spool, b"changed")
    assert [path.read_bytes() for path in spool.take(key).files] == [b"changed"]


def test_limits_of_a_series(spool: Spool) -> None:
    for number in range(3):
        receive(spool, b"x", str(number))
    with pytest.raises(UploadTooLarge):
        receive(spool, b"x", "3")
    with pytest.raises(UploadTooLarge):
        receive(spool, bytes((1 << 20) + 1), series="other")
    receive(spool, bytes(1 << 20), series="other")
    with pytest.raises(UploadTooLarge):
        receive(spool, b"x", "2", series="other")


def test_uids_never_become_paths(spool: Spool, tmp_path: Path) -> None:
    receive(spool, b"one", "../../../escaped", "/etc/../../x")
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".json" and path.name != "lock"]
    assert [path.parent.parent for path in files] == [tmp_path / "node" / "series"]


def test_a_restart_keeps_complete_instances_and_removes_the_others(spool: Spool) -> None:
    key = receive(spool, b"one").series_key
    taken = spool.take(receive(spool, b"two", series="taken").series_key)
    (spool.receiving / "half.dcm").write_bytes(b"half")
    spool.close()
    again = Spool(spool.root, 1, 3)
    assert again.quiet_series(0) == [key]
    assert again.quiet_series(60) == []  # the quiet time starts again
    assert again.batches() == [taken]
    assert list(again.receiving.iterdir()) == []
    receive(again, b"x", "2")
    receive(again, b"x", "3")
    with pytest.raises(UploadTooLarge):
        receive(again, b"x", "4")
    again.close()


def test_age_of_the_oldest_series(spool: Spool) -> None:
    """Series that still arrive, that wait for a full queue, and that were taken count, also after a restart."""
    assert spool.oldest_seconds() == 0
    taken = spool.take(receive(spool, b"one", series="taken").series_key)
    waiting = spool.root / "series" / receive(spool, b"two").series_key
    now = time.time()
    os.utime(taken.folder, (now - 500, now - 500))
    os.utime(waiting, (now - 900, now - 900))
    assert 899 < spool.oldest_seconds() < 930
    receive(spool, b"three", "2")
    assert 499 < spool.oldest_seconds() < 530
    spool.close()
    again = Spool(spool.root, 1, 3)
    assert 499 < again.oldest_seconds() < 530
    again.discard(taken)
    assert again.oldest_seconds() < 30
    again.close()


def test_a_second_process_is_refused(spool: Spool) -> None:
    with pytest.raises(AddressUnavailable, match="one `counterpart node`"):
        Spool(spool.root, 1, 3)


def test_the_record_of_a_series(spool: Spool) -> None:
    batch = spool.take(receive(spool, b"one").series_key)
    assert spool.read_handed(batch.series) is None
    handed = HandedSeries(batch.name, "job", {"instance": "digest"})
    spool.finish(batch, handed)
    assert spool.read_handed(batch.series) == handed
    assert list(spool.handed_jobs()) == [(batch.series, "job")]
    assert spool.batches() == []
    spool.forget(batch.series)
    assert spool.read_handed(batch.series) is None


def test_senders_are_kept_until_their_series_is_a_job(spool: Spool) -> None:
    key = receive(spool, b"one").series_key
    receive(spool, b"two", "2")
    batch = spool.take(key)
    receive(spool, b"three", "3")
    spool.discard(batch)
    assert spool.read_senders(key) == (Sender("SCANNER", "10.0.0.5"),)
    spool.discard(spool.take(key))
    assert spool.read_senders(key) == ()
