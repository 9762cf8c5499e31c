import hashlib
import os
import stat
from pathlib import Path

import pytest

from app.jobs.store import STALE_SECONDS, Store
from tests.jobs.support import JOB, commit_scan, save_intermediate


def record_syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the files and folders that are synced to disk from now on."""
    synced: list[str] = []
    monkeypatch.setattr("app.jobs.store.os.fsync", lambda f: synced.append(Path(f"/proc/self/fd/{f}").readlink().name))
    return synced


def test_upload_is_hashed_while_it_is_written(tmp_path: Path) -> None:
    digest = commit_scan(Store(tmp_path), JOB, b"one scan")
    assert digest == hashlib.sha256(hashlib.sha256(b"one scan").hexdigest().encode()).hexdigest()


def test_digest_does_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = commit_scan(store, JOB, b"a", b"b")
    assert commit_scan(store, JOB.replace("0", "f"), b"b", b"a") == digest
    assert commit_scan(store, JOB.replace("1", "f"), b"ab") != digest


def test_only_the_owner_can_read_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "store")
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700


def test_uncommitted_upload_is_removed(tmp_path: Path) -> None:
    with Store(tmp_path).receive_upload() as upload:
        upload.begin()
        upload.write(b"half")
    assert not list((tmp_path / "incoming").iterdir())


def test_scan_and_results_are_synced_before_they_are_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = record_syncs(monkeypatch)
    store = Store(tmp_path)
    commit_scan(store, JOB, b"a", b"b")
    assert {"000000", "000001"} < set(synced[:3])  # and their folder, which still has its random name
    assert sorted(synced[3:]) == [JOB, "jobs"]
    synced.clear()
    save_intermediate(store, b"1")
    assert synced == ["inferred", JOB]
    work = store.create_work_folder(JOB)
    (work / "mask").write_bytes(b"1")
    synced.clear()
    store.publish(JOB, work.name)
    assert (sorted(synced[:2]), synced[2:]) == (["mask", work.name], [JOB])


def test_start_removes_stale_uploads_and_erasures_of_older_versions(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("incoming/old", "incoming/new", "trash/any", f"trash/{JOB}.0"):
        (tmp_path / name).mkdir()
    long_ago = (tmp_path / "incoming/new").stat().st_mtime - STALE_SECONDS - 60
    os.utime(tmp_path / "incoming/old", (long_ago, long_ago))
    store.sweep()
    assert [path.name for path in (tmp_path / "incoming").iterdir()] == ["new"]
    assert store.unfinished_erasures() == [path.name[: len(JOB)] for path in (tmp_path / "trash").iterdir()] == [JOB]


def test_start_is_not_stopped_by_an_upload_that_another_process_commits_meanwhile(tmp_path: Path) -> None:
    store = Store(tmp_path)
    # It is listed, but has no status, as a folder that is renamed between the list and the status.
    (tmp_path / "incoming" / "committed").symlink_to(tmp_path / "missing")
    store.sweep()


def test_live_processes_have_different_slots(tmp_path: Path) -> None:
    store = Store(tmp_path / "here")
    first, second = store.acquire_slot(), store.acquire_slot()
    assert first.name.endswith("-0")
    assert second.name.endswith("-1")
    assert Store(tmp_path / "another machine").acquire_slot().name != first.name
    first.release()
    assert store.acquire_slot().name == first.name
