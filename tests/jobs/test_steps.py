"""Steps infer, export and publish: after a crash the next worker continues, and no intermediate files remain."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx2
import pytest

from app.export.outputs import DICOM_NAMES, REQUIRED_NAMES
from app.jobs.bucket import BucketStore
from app.jobs.engine import Metadata
from app.jobs.store import INTERMEDIATE_PREFIX, Store
from app.jobs.subprocess_engine import SubprocessEngine
from app.jobs.workflow import STEPS_VERSION, JobService
from tests.api import support as api_support
from tests.api.service_process import run_service
from tests.api.support import URL, FakeEngine
from tests.jobs.support import problem_of, running_service, submit, wait_for_state
from tests.support.dicom import write_series, zip_files
from tests.support.phantom import brain, grid, with_lesion
from tests.support.servers import BUCKET

SHAPE = (58, 70, 52)
RESULTS = (*REQUIRED_NAMES, *DICOM_NAMES)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DICOM series in a zip, which a second reader must unpack again."""
    folder = tmp_path_factory.mktemp("series")
    volume = with_lesion(brain(SHAPE, grid(SHAPE)), (25.0, 10.0, 20.0), 15.0)
    return zip_files(folder / "series.zip", write_series(folder / "series", volume))


@pytest.fixture(scope="module")
def reference(archive: Path, tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Results of an undisturbed run, exported from memory."""
    folder = tmp_path_factory.mktemp("reference")
    with run_service(folder / "store", folder / "log", command("normal"), models=str(tiny_models)) as service:
        job = send(service.http, archive)
        api_support.wait_for_state(service.http, job, "succeeded")
        return download(service.http, job)


def command(kind: str, *role: str) -> Sequence[str]:
    return (sys.executable, "-m", "tests.jobs.faulty_service", kind, *role)


def send(http: httpx2.Client, archive: Path) -> str:
    answer = http.post(URL, content=archive.read_bytes())
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def download(http: httpx2.Client, job: str) -> dict[str, bytes]:
    return {name: http.get(f"{URL}/{job}/{name}").raise_for_status().content for name in RESULTS}


def job_files(folder: Path) -> list[str]:
    """Return the names in a job's folder without their random parts."""
    return sorted(path.name.split("-")[0] for path in folder.iterdir())


def test_scan_of_a_killed_worker_is_exported_without_running_the_networks_again(
    archive: Path, reference: dict[str, bytes], tiny_models: Path, tmp_path: Path
) -> None:
    store, log, models = tmp_path / "store", tmp_path / "log", str(tiny_models)
    with run_service(store, log, command("killed"), models=models) as service:
        job = send(service.http, archive)
        assert service.process.wait(120) == -9
    assert job_files(store / "jobs" / job) == ["inferred", "scan", "work"]
    with run_service(store, log, command("no_networks"), models=models) as service:
        api_support.wait_for_state(service.http, job, "succeeded")
        assert download(service.http, job) == reference
        assert job_files(store / "jobs" / job) == ["results", "scan"]
        # This service cannot run the networks: another scan fails.
        other = service.http.post(f"{URL}?seed=1", content=archive.read_bytes()).json()["id"]
        api_support.wait_for_state(service.http, other, "failed")
    assert '"exception": "AssertionError"' in log.read_text()


@pytest.mark.proof
def test_scan_of_a_killed_machine_is_exported_by_another_machine(
    archive: Path,
    reference: dict[str, bytes],
    cluster_settings: dict[str, str],
    tmp_path: Path,
) -> None:
    bucket = BucketStore(cluster_settings["store"], tmp_path / "observer")

    def machine(name: str, *arguments: str):  # type: ignore[no-untyped-def]
        return run_service(tmp_path / name, tmp_path / f"{name}.log", command(*arguments), None, **cluster_settings)

    with machine("api", "normal", "--no-worker") as api:
        with machine("first", "killed", "--no-api") as first:
            job = send(api.http, archive)
            assert first.process.wait(120) == -9
        (intermediate,) = bucket._names(f"jobs/{job}/inferred/")
        assert bucket.sizes()[job] > 1_000_000
        with machine("second", "no_networks", "--no-api"):
            api_support.wait_for_state(api.http, job, "succeeded")
            assert download(api.http, job) == reference
            assert intermediate not in bucket._names("")
            assert not list((tmp_path / "second").rglob(f"{INTERMEDIATE_PREFIX}*"))
        assert api.http.delete(f"{URL}/{job}").status_code == 204
    assert bucket._names("") == []


@pytest.fixture
def cluster_settings(
    database: str, s3_environ: dict[str, str], tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    for name, value in s3_environ.items():
        monkeypatch.setenv(name, value)
    return {"database": database, "store": f"s3://{BUCKET}/steps", "models": str(tiny_models)}


def submit_until_export(service: JobService, engine: FakeEngine, folder: Path, exports: int = 1) -> str:
    """Submit a job with a long export, and wait until its export runs."""
    job = submit(service, folder, export_seconds=60)
    deadline = time.monotonic() + 120
    while len(engine.exports) < exports:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert job_files(folder / "jobs" / job) == ["inferred", "scan", "work"]
    return job


@pytest.mark.parametrize(("intermediate_exists", "inferences"), [(True, 1), (False, 2)])
def test_drained_export_continues_at_the_next_start(
    tmp_path: Path,
    intermediate_exists: bool,  # noqa: FBT001
    inferences: int,
) -> None:
    engine = FakeEngine()
    with running_service(tmp_path, engine) as service:
        job = submit_until_export(service, engine, tmp_path)
    assert job_files(tmp_path / "jobs" / job) == ["inferred", "scan"]
    if not intermediate_exists:  # as after a restore from a backup of the store that is older than the database's
        Store(tmp_path).discard_intermediate(job)
    engine.export_seconds = False
    with running_service(tmp_path, engine) as service:
        wait_for_state(service, job, "succeeded")
    assert len(engine.inferences) == inferences
    assert [text for text, _ in engine.exports] == [f"{job} 1", f"{job} {inferences}"]
    assert job_files(tmp_path / "jobs" / job) == ["results", "scan"]


def test_cancelled_or_erased_export_leaves_no_intermediate_files(tmp_path: Path) -> None:
    engine = FakeEngine()
    with running_service(tmp_path, engine) as service:
        cancelled = submit_until_export(service, engine, tmp_path)
        service.queue.cancel(cancelled)
        assert "inferred" not in job_files(tmp_path / "jobs" / cancelled)
        erased = submit_until_export(service, engine, tmp_path, 2)  # so the worker has stopped the first job
        assert job_files(tmp_path / "jobs" / cancelled) == ["scan"]
        service.queue.erase(erased)
        assert not list(tmp_path.rglob(f"*{erased}*"))
        last = submit(service, tmp_path, name="last")
        wait_for_state(service, last, "succeeded")
        assert not list(tmp_path.rglob(f"*{erased}*"))
    assert not list(tmp_path.rglob(f"{INTERMEDIATE_PREFIX}*"))


def test_failed_export_leaves_no_intermediate_files_and_infers_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[str] = []
    save_intermediate = Store.save_intermediate

    def record(store: Store, job: str, file: Path) -> str:
        saved.append(job)
        return save_intermediate(store, job, file)

    monkeypatch.setattr(Store, "save_intermediate", record)
    engine = SubprocessEngine(FakeEngine(), "tests.api.support:FakeEngine", {})
    with running_service(tmp_path, engine) as service:
        jobs = {"internal_error": submit(service, tmp_path, raise_in_export="x")}
        jobs["worker_lost"] = submit(service, tmp_path, exit_process_in_export=True)
        for code, job in jobs.items():
            assert problem_of(service, job)["code"] == code
            assert job_files(tmp_path / "jobs" / job) == ["scan"]
        assert saved == list(jobs.values())
        good = submit(service, tmp_path, name="good")
        wait_for_state(service, good, "succeeded")


def test_job_of_another_steps_version_restarts_from_its_inference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    monkeypatch.setattr("app.jobs.workflow.STEPS_VERSION", "2")  # whose inference results this version cannot load
    with running_service(tmp_path, engine) as service:
        started = submit_until_export(service, engine, tmp_path)
        waiting = submit(service, tmp_path, name="waiting")
    engine.export_seconds = False
    monkeypatch.undo()
    with running_service(tmp_path, engine) as service:
        for job in (waiting, started):
            wait_for_state(service, job, "succeeded")
    assert sorted(path.parents[1].name for path, _ in engine.inferences) == sorted([started, started, waiting])
    assert job_files(tmp_path / "jobs" / started) == ["results", "scan"]


def test_steps_version_changes_with_the_format_of_inference_results() -> None:
    """If this test fails, increment `STEPS_VERSION`: a job that the last version began then starts again."""
    assert STEPS_VERSION == "3"
    assert set(Metadata.model_fields) == {
        *("manifest", "model", "brain", "no_brain", "stack_shape", "source_shape", "background", "scale"),
        *("scan_score", "median_kl_range", "reconstruction", "outlier_fraction", "reversed", "seconds"),
    }
