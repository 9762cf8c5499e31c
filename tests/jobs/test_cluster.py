"""PostgreSQL and a bucket: the same jobs on several machines."""

from pathlib import Path

import pytest

from app.jobs.bucket import BucketStore
from app.jobs.database import connect
from app.jobs.maintenance import WorkerRegistry
from tests.api.service_process import API_ONLY, WORKER_ONLY, run_service
from tests.api.support import URL, fake_scan, wait_for_state
from tests.jobs.support import JOB
from tests.support.servers import BUCKET


def test_registry_works_on_postgresql(database: str) -> None:
    engines = connect(database), connect(database)
    one, two = map(WorkerRegistry, engines)
    one.create_tables()
    two.create_tables()
    one.send_heartbeat("w")
    assert two.heartbeats() == {"w": 0}
    for registry in (one, two):
        registry.record_crash("w", [JOB])
    assert two.count_crashes(JOB) == 1
    assert not two.is_quarantined(JOB)
    one.record_child_crash("v", JOB)
    assert two.is_quarantined(JOB)
    one.delete_crash_records(JOB)
    two.remove_worker("w")
    for engine in engines:
        engine.dispose()


@pytest.mark.proof
def test_job_of_a_dead_worker_is_taken_over_by_another_machine(
    database: str, s3_environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environ.items():
        monkeypatch.setenv(name, value)
    shared = {"database": database, "store": f"s3://{BUCKET}/cluster", "drain_seconds": "0"}

    def machine(name: str, role: tuple[str, ...]):  # type: ignore[no-untyped-def]
        return run_service(tmp_path / name, tmp_path / f"{name}.log", role, None, **shared)

    with machine("api-1", API_ONLY) as api, machine("api-2", API_ONLY) as other:
        job = api.http.post(URL, content=fake_scan(seconds=1.5)).json()["id"]
        assert other.http.get(f"{URL}/{job}").json()["state"] == "queued"
        assert other.http.post(URL, content=fake_scan(seconds=1.5)).json()["id"] == job
        with machine("worker-1", WORKER_ONLY) as first:
            wait_for_state(other.http, job, "running")
            first.process.kill()
            first.process.wait()
        with machine("worker-2", WORKER_ONLY) as second:
            assert second.http.get("/v1/scans").status_code == 404
            wait_for_state(api.http, job, "succeeded")
            assert other.http.get(f"{URL}/{job}/mask.nii.gz").content == b"mask.nii.gz" * 10
            assert other.http.get(f"{URL}/{job}").json()["lesion_volume_ml"] == 2.5
            assert 'outcome="succeeded"} 1.0' in second.http.get("/metrics").text
            assert other.http.delete(f"{URL}/{job}").status_code == 204
            assert api.http.get(f"{URL}/{job}").status_code == 404
    # The next start on its machine removes the local files of the killed worker.
    BucketStore(shared["store"], tmp_path / "worker-1").acquire_slot()
    assert not list(tmp_path.rglob(f"*{job}*"))
