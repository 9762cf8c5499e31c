from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import StoreUnavailable
from app.jobs.bucket import BucketStore
from tests.jobs.support import JOB, commit_scan, save_intermediate

OpenStore = Callable[[str], BucketStore]


@pytest.mark.usefixtures("open_bucket_store")  # its environment
def test_cleanup_and_restart_remove_local_copies(tmp_path: Path) -> None:
    store = BucketStore("s3://scans/local-copies", tmp_path / "machine")
    slot = store.acquire_slot()
    commit_scan(store, JOB, b"a", b"b")
    store.scan_path(JOB)
    save_intermediate(store, b"1")
    store.cleanup(JOB)
    assert not list(tmp_path.rglob(f"*{JOB}*"))
    store.scan_path(JOB)
    slot.release()  # as the system does when the process dies
    BucketStore("s3://scans/local-copies", tmp_path / "machine").acquire_slot()
    assert not list(tmp_path.rglob(f"*{JOB}*"))


def test_results_of_a_second_attempt_are_deleted(open_bucket_store: OpenStore) -> None:
    stores = open_bucket_store("first"), open_bucket_store("second")
    commit_scan(stores[0], JOB, b"a", b"b")
    for store in stores:
        work = store.create_work_folder(JOB)
        (work / "mask").write_bytes(b"1")
        store.publish(JOB, store.stage(JOB, work))
    assert len(stores[0]._names("")) == 4  # two files of the scan, one result, and the name of its attempt


def test_missing_bucket_is_unavailable(open_bucket_store: OpenStore, tmp_path: Path) -> None:
    open_bucket_store("first").check()
    with pytest.raises(StoreUnavailable):
        BucketStore("s3://no-such-bucket", tmp_path).check()
