import hashlib
import os
import stat
from pathlib import Path

import pytest

from app.jobs.store import STALE_SECONDS, Store

JOB = "0123456789abcdef-0123456789abcdef"


def fill(store: Store, job: str, *files: bytes) -> str:
    with store.receive() as incoming:
        for data in files:
            incoming.begin()
            incoming.write(data[:3])
            incoming.write(data[3:])
            incoming.end()
        store.keep(incoming, job)
        return incoming.digest


def test_an_upload_is_hashed_on_its_way(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    digest = fill(store, JOB, b"one scan")
    assert digest == hashlib.sha256(hashlib.sha256(b"one scan").hexdigest().encode()).hexdigest()
    assert store.scan(JOB).read_bytes() == b"one scan"


def test_several_files_are_a_folder_and_their_order_does_not_matter(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = fill(store, JOB, b"a", b"b")
    assert [path.read_bytes() for path in sorted(store.scan(JOB).iterdir())] == [b"a", b"b"]
    assert fill(store, JOB.replace("0", "f"), b"b", b"a") == digest
    assert fill(store, JOB.replace("1", "f"), b"ab") != digest


def test_only_its_owner_reads_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "store")
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700


def test_what_was_not_kept_is_gone(tmp_path: Path) -> None:
    with Store(tmp_path).receive() as incoming:
        incoming.begin()
        incoming.write(b"half")
    assert not list((tmp_path / "incoming").iterdir())


def test_results_appear_all_at_once_and_only_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, JOB, b"scan")
    first = store.work(JOB)
    (first / "mask").write_bytes(b"1")
    assert store.read(JOB, "mask") is None
    store.publish(JOB, first.name)
    store.publish(JOB, first.name)  # resumed after a crash between the rename and its record

    second = store.work(JOB)
    (second / "mask").write_bytes(b"2")
    store.publish(JOB, second.name)
    assert store.read(JOB, "mask") == b"1"
    assert sorted(p.name for p in (tmp_path / "jobs" / JOB).iterdir()) == ["results", "scan"]


def test_scan_and_results_are_on_the_disk_before_anyone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr("app.jobs.store.os.fsync", lambda f: synced.append(Path(f"/proc/self/fd/{f}").readlink().name))
    store = Store(tmp_path)
    fill(store, JOB, b"a", b"b")
    assert {"000000", "000001"} < set(synced[:3])  # and their folder, which has a name of its own yet
    assert sorted(synced[3:]) == [JOB, "jobs"]
    work = store.work(JOB)
    (work / "mask").write_bytes(b"1")
    synced.clear()
    store.publish(JOB, work.name)
    assert (sorted(synced[:2]), synced[2:]) == (["mask", work.name], [JOB])


def inferred(store: Store, content: bytes) -> str:
    work = store.work(JOB)
    (work / "inferred").write_bytes(content)
    return store.hold(JOB, work / "inferred")


def test_what_was_inferred_is_kept_until_there_are_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    fill(store, JOB, b"scan")
    synced: list[str] = []
    monkeypatch.setattr("app.jobs.store.os.fsync", lambda f: synced.append(Path(f"/proc/self/fd/{f}").readlink().name))
    first, second = inferred(store, b"1"), inferred(store, b"2")
    assert synced == ["inferred", JOB] * 2
    work = store.work(JOB)
    for name, content in ((first, b"1"), (second, b"2")):
        found = store.held(JOB, name)
        assert found is not None
        assert found.read_bytes() == content
    store.release(JOB, first)
    store.release(JOB, first)
    assert store.held(JOB, first) is None
    assert store.held(JOB, second) is not None
    store.publish(JOB, work.name)
    assert sorted(p.name for p in (tmp_path / "jobs" / JOB).iterdir()) == ["results", "scan"]
    # A death between the results and their record: it is published again.
    store.hold(JOB, _file(tmp_path))
    store.publish(JOB, work.name)
    assert sorted(p.name for p in (tmp_path / "jobs" / JOB).iterdir()) == ["results", "scan"]


def _file(folder: Path) -> Path:
    (folder / "late").write_bytes(b"late")
    return folder / "late"


def test_who_lost_the_job_or_it_was_erased_leaves_nothing_inferred(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, JOB, b"scan")
    work = store.work(JOB)
    (work / "inferred").write_bytes(b"slow")
    store.work(JOB)  # of the worker that took over
    with pytest.raises(FileNotFoundError):
        store.hold(JOB, work / "inferred")
    name = inferred(store, b"1")
    store.erase(JOB)
    assert store.held(JOB, name) is None
    store.release(JOB)
    assert not list(tmp_path.rglob(f"*{JOB}*"))


def test_an_attempt_clears_what_the_one_before_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, JOB, b"scan")
    old = store.work(JOB)
    new = store.work(JOB)
    assert not old.exists()
    assert new.is_dir()


def test_erasing_beats_a_writer(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store, JOB, b"scan")
    work = store.work(JOB)
    store.erase(JOB)
    store.erase(JOB)
    with pytest.raises(FileNotFoundError):
        (work / "mask").write_bytes(b"late")
    with pytest.raises(FileNotFoundError):
        store.publish(JOB, work.name)
    assert not list(tmp_path.rglob(f"*{JOB}*"))


def test_a_start_sweeps_what_a_dead_process_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("incoming/old", "incoming/new", "trash/any"):
        (tmp_path / name).mkdir()
    long_ago = (tmp_path / "incoming/new").stat().st_mtime - STALE_SECONDS - 60
    os.utime(tmp_path / "incoming/old", (long_ago, long_ago))
    store.sweep()
    assert [path.name for path in (tmp_path / "incoming").iterdir()] == ["new"]
    assert not list((tmp_path / "trash").iterdir())


def test_two_living_processes_have_two_names(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = store.take_slot(), store.take_slot()
    assert first.name.endswith("-0")
    assert second.name.endswith("-1")
    first.free()
    assert store.take_slot().name == first.name


def test_two_machines_have_two_names(tmp_path: Path) -> None:
    here, there = Store(tmp_path / "here").take_slot(), Store(tmp_path / "there").take_slot()
    assert here.name != there.name
