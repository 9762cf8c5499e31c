"""Behaviour that every store has: the local folder, and a bucket that two machines share."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.jobs.store import Store
from tests.jobs.support import JOB, commit_scan, save_intermediate

OpenStore = Callable[[str], Store]


@pytest.fixture(params=["local", "bucket"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Return a function that opens the store on a machine. All processes of one machine share a local folder."""
    if request.param == "local":
        return lambda _: Store(tmp_path / "store")
    opened: OpenStore = request.getfixturevalue("open_bucket_store")
    return opened


def stage_results(store: Store, content: bytes) -> str:
    work = store.create_work_folder(JOB)
    (work / "mask").write_bytes(content)
    return store.stage(JOB, work)


def test_scan_is_a_file_or_a_folder_on_every_machine(open_store: OpenStore) -> None:
    first, second = open_store("first"), open_store("second")
    several = JOB[::-1]
    commit_scan(first, JOB, b"one file")
    commit_scan(first, several, b"a", b"b")
    for store in (first, second):
        assert store.scan_path(JOB).read_bytes() == b"one file"
        assert [path.read_bytes() for path in sorted(store.scan_path(several).iterdir())] == [b"a", b"b"]
    assert first.sizes()[JOB] >= 8
    assert first.sizes().keys() == {JOB, several}


def test_first_published_results_stay(open_store: OpenStore) -> None:
    first, second = open_store("first"), open_store("second")
    commit_scan(first, JOB, b"scan")
    published = stage_results(first, b"1")
    assert first.read(JOB, "mask") is None
    first.publish(JOB, published)
    first.publish(JOB, published)  # the process died before the step was recorded
    second.publish(JOB, stage_results(second, b"2"))
    assert first.read(JOB, "mask") == second.read(JOB, "mask") == b"1"
    assert first.read(JOB, "other") is None
    file = second.fetch(JOB, "mask")
    assert file is not None
    assert file.path.read_bytes() == b"1"
    file.close()
    assert not list((second.root / "incoming").iterdir())


def test_inference_result_is_kept_until_results_are_published(open_store: OpenStore) -> None:
    first, second = open_store("first"), open_store("second")
    commit_scan(first, JOB, b"scan")
    names = [save_intermediate(first, b"0"), save_intermediate(first, b"1")]
    for store in (second, first, second):
        for name, content in zip(names, (b"0", b"1"), strict=True):
            path = store.load_intermediate(JOB, name)
            assert path is not None
            assert path.read_bytes() == content
    for store in (first, first, second):
        store.discard_intermediate(JOB, names[0])
    assert second.load_intermediate(JOB, names[0]) is None
    assert second.load_intermediate(JOB, names[1]) is not None
    second.publish(JOB, stage_results(second, b"results"))
    first.cleanup(JOB)
    assert first.load_intermediate(JOB, names[1]) is None


def test_new_attempt_removes_the_files_of_the_last_one(open_store: OpenStore) -> None:
    store = open_store("first")
    commit_scan(store, JOB, b"scan")
    old = store.create_work_folder(JOB)
    (old / "inferred").write_bytes(b"slow")
    new = store.create_work_folder(JOB)
    assert new.is_dir()
    assert not old.exists()
    with pytest.raises(FileNotFoundError):
        store.save_intermediate(JOB, old / "inferred")


def test_writers_cannot_bring_back_an_erased_job(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store("first")
    commit_scan(store, JOB, b"scan")
    staged, inferred = stage_results(store, b"1"), save_intermediate(store, b"2")
    store.erase(JOB)
    store.erase(JOB)
    assert not list(tmp_path.rglob(f"*{JOB}*"))
    assert store.load_intermediate(JOB, inferred) is None
    for write in (
        lambda: store.publish(JOB, staged),
        lambda: stage_results(store, b"late"),
        lambda: save_intermediate(store, b"late"),
    ):
        with pytest.raises(FileNotFoundError):
            write()
    store.cleanup(JOB)
    assert store.sizes() == {}
    assert not list(tmp_path.rglob(f"*{JOB}*"))


def test_erasure_is_remembered_until_it_is_finished(open_store: OpenStore, tmp_path: Path) -> None:
    first, second = open_store("first"), open_store("second")
    commit_scan(first, JOB, b"a", b"b")
    save_intermediate(first, b"1")
    first.begin_erasure(JOB)
    for store in (first, second):
        assert store.is_erased(JOB)
        assert not store.is_erased(JOB[::-1])
        assert store.unfinished_erasures() == [JOB]
        assert store.sizes() == {}
        assert store.orphaned(time.time() + 60) == []
    first.begin_erasure(JOB)
    second.clear_erased(JOB)
    for store in (second, first):
        store.finish_erasure(JOB)
    assert not first.is_erased(JOB)
    assert second.unfinished_erasures() == []
    assert not list(tmp_path.rglob(f"*{JOB}*"))


def test_cancelled_job_keeps_only_its_scan(open_store: OpenStore) -> None:
    first, second = open_store("first"), open_store("second")
    commit_scan(first, JOB, b"scan")
    first.publish(JOB, stage_results(first, b"1"))
    name = save_intermediate(first, b"1")
    stage_results(first, b"2")
    for store in (first, first, second):
        store.discard_all_but_scan(JOB)
    first.cleanup(JOB)
    for store in (first, second):
        assert store.read(JOB, "mask") is None
        assert store.load_intermediate(JOB, name) is None
        assert store.sizes()[JOB] <= 4 + 4096 * 2
        assert store.scan_path(JOB).read_bytes() == b"scan"


def test_upload_without_further_files_is_orphaned(open_store: OpenStore) -> None:
    store = open_store("first")
    commit_scan(store, JOB, b"a", b"b")
    assert store.orphaned(time.time() - 60) == []
    assert store.orphaned(time.time() + 60) == [JOB]
    stage_results(store, b"1")
    assert store.orphaned(time.time() + 60) == []


def test_store_in_order_passes_its_check(open_store: OpenStore) -> None:
    open_store("first").check()
