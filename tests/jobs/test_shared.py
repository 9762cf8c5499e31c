"""PostgreSQL and a bucket: the same jobs, on any number of machines."""

import time
from pathlib import Path

import pytest

from app.errors import StoreUnavailable
from app.jobs.bucket import BucketStore
from app.jobs.database import connect
from app.jobs.roster import DEATHS, Roster
from scripts.servers import BUCKET
from tests.api.service_process import API_ONLY, WORKER_ONLY, run_service
from tests.api.support import fake_scan
from tests.jobs.test_store import JOB, fill

URL = "/v1/scans"
WAIT = {"Prefer": "wait=120"}


@pytest.fixture
def bucket(server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> BucketStore:
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    store = BucketStore(f"s3://{BUCKET}/{tmp_path.name}", tmp_path / "scratch")
    store.take_slot()
    return store


def names(store: BucketStore) -> list[str]:
    return sorted(store._names(""))


def attempt(store: BucketStore, content: bytes) -> str:
    work = store.work(JOB)
    (work / "mask").write_bytes(content)
    return store.stage(JOB, work)


def test_a_bucket_keeps_scans_and_publishes_once(bucket: BucketStore, tmp_path: Path) -> None:
    fill(bucket, JOB, b"a", b"b")
    other = BucketStore(f"s3://{BUCKET}/{tmp_path.name}", tmp_path / "another machine")
    other.take_slot()
    assert [path.read_bytes() for path in sorted(other.scan(JOB).iterdir())] == [b"a", b"b"]
    first, second = attempt(bucket, b"1"), attempt(other, b"2")
    assert bucket.read(JOB, "mask") is None
    bucket.publish(JOB, first)
    bucket.publish(JOB, first)
    other.publish(JOB, second)
    assert bucket.read(JOB, "mask") == other.read(JOB, "mask") == b"1"
    assert bucket.read(JOB, "none") is None
    assert len(names(bucket)) == 4  # two files, one result, and what names it
    other.let_go(JOB)
    assert not list((tmp_path / "another machine").rglob(f"*{JOB}*"))


def inferred(store: BucketStore, content: bytes) -> str:
    work = store.work(JOB)
    (work / "inferred").write_bytes(content)
    return store.hold(JOB, work / "inferred")


def test_what_one_machine_inferred_another_finds_until_there_are_results(bucket: BucketStore, tmp_path: Path) -> None:
    fill(bucket, JOB, b"a")
    other = BucketStore(f"s3://{BUCKET}/{tmp_path.name}", tmp_path / "another machine")
    other.take_slot()
    first, second, third = inferred(bucket, b"1"), inferred(bucket, b"2"), inferred(other, b"3")
    assert len(names(bucket)) == 4
    bucket.let_go(JOB)
    for store, name, content in ((other, first, b"1"), (bucket, second, b"2"), (bucket, third, b"3")):
        for _ in range(2):  # fetched, and found here
            found = store.held(JOB, name)
            assert found is not None
            assert found.read_bytes() == content
    other.release(JOB, third)
    other.let_go(JOB)
    assert other.held(JOB, third) is None
    assert len(names(bucket)) == 3
    bucket.publish(JOB, attempt(bucket, b"results"))
    assert other.held(JOB, first) is None
    assert [name for name in names(bucket) if "inferred" in name] == []
    assert [path.name for path in (tmp_path / "another machine").rglob("inferred*")] == []


def test_an_upload_without_a_job_is_found_in_a_bucket(bucket: BucketStore) -> None:
    fill(bucket, JOB, b"a", b"b")
    assert bucket.unclaimed(time.time() - 60) == []
    assert bucket.unclaimed(time.time() + 60) == [JOB]
    attempt(bucket, b"1")
    assert bucket.unclaimed(time.time() + 60) == []


def test_erasing_beats_a_writer(bucket: BucketStore) -> None:
    fill(bucket, JOB, b"one file")
    assert bucket.scan(JOB).read_bytes() == b"one file"
    work = bucket.work(JOB)
    (work / "mask").write_bytes(b"late")
    bucket.erase(JOB)
    assert not list(bucket.root.rglob(f"*{JOB}*"))
    work.mkdir(parents=True)
    (work / "mask").write_bytes(b"late")
    with pytest.raises(FileNotFoundError):
        bucket.stage(JOB, work)
    with pytest.raises(FileNotFoundError):
        bucket.hold(JOB, work / "mask")
    with pytest.raises(FileNotFoundError):
        bucket.publish(JOB, work.name)
    assert names(bucket) == []


def test_a_bucket_that_is_not_there_is_named(bucket: BucketStore, tmp_path: Path) -> None:
    bucket.check()
    with pytest.raises(StoreUnavailable):
        BucketStore("s3://no-such-bucket", tmp_path).check()


def test_the_roster_on_postgresql(database: str) -> None:
    engines = connect(database), connect(database)
    one, two = map(Roster, engines)
    one.create()
    two.create()
    one.beat("w")
    assert two.beats() == {"w": 0}
    for roster in (one, two):
        roster.lost("w", [JOB])
    assert (two.deaths(JOB), two.blamed(JOB)) == (1, 0)
    one.killed("v", JOB)
    assert two.blamed(JOB) == DEATHS
    one.forget(JOB)
    two.leave("w")
    for engine in engines:
        engine.dispose()


@pytest.mark.proof
def test_a_worker_that_dies_is_replaced_by_another_machine(
    database: str, server: dict[str, str], tmp_path: Path
) -> None:
    shared = {"database": database, "store": f"s3://{BUCKET}/cluster", "drain_seconds": "0"}

    def machine(name: str, role: tuple[str, ...]):  # type: ignore[no-untyped-def]
        return run_service(tmp_path / name, tmp_path / f"{name}.log", role, environ=server, **shared)

    with machine("api-1", API_ONLY) as api, machine("api-2", API_ONLY) as other:
        job = api.http.post(URL, content=fake_scan(seconds=1.5)).json()["id"]
        assert other.http.get(f"{URL}/{job}").json()["state"] == "queued"
        assert other.http.post(URL, content=fake_scan(seconds=1.5)).json()["id"] == job
        with machine("worker-1", WORKER_ONLY) as first:
            _until(other.http, job, "running")
            first.process.kill()
            first.process.wait()
        with machine("worker-2", WORKER_ONLY) as second:
            assert second.http.get("/v1/scans").status_code == 404
            _until(api.http, job, "succeeded")
            assert other.http.get(f"{URL}/{job}/mask.nii.gz").content == b"mask.nii.gz" * 10
            assert other.http.get(f"{URL}/{job}").json()["lesion_volume_ml"] == 2.5
            assert 'outcome="succeeded"} 1.0' in second.http.get("/metrics").text
            assert other.http.delete(f"{URL}/{job}").status_code == 204
            assert api.http.get(f"{URL}/{job}").status_code == 404
    # What the killed process had on its desk goes when its machine starts again.
    BucketStore(shared["store"], tmp_path / "worker-1").take_slot()
    assert not list(tmp_path.rglob(f"*{job}*"))


def _until(http, job: str, state: str) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if http.get(f"{URL}/{job}").json()["state"] == state:
            return
        time.sleep(0.05)
    raise AssertionError(f"never {state}")
