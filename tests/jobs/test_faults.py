"""Faults of the service: the job is tried again, the worker pauses, and nothing is published twice."""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from dbos._sys_db import SystemDatabase
from fastapi.testclient import TestClient

from app.analysis import AnalysisRequest, Progress
from app.errors import (
    CounterpartError,
    DamagedBundle,
    InternalError,
    InvalidHeader,
    NotReady,
    ProviderUnavailable,
    StoreFull,
    StoreUnavailable,
    TruncatedFile,
)
from app.jobs import workflow
from app.jobs.faults import find_service_fault
from app.jobs.maintenance import MAX_FAULTS, WorkerRegistry
from app.jobs.metrics import Metrics
from app.jobs.store import Store
from app.jobs.subprocess_engine import SubprocessEngine
from app.jobs.workflow import JobService
from app.main import create_app, serve
from app.settings import read_settings
from tests.api.support import BASE_URL, FakeEngine
from tests.jobs.support import problem_of, running_service, submit, wait_for_state

FULL_DISK = OSError(errno.ENOSPC, "No space left on device")
FULL_DATABASE = sa.exc.OperationalError("INSERT", {}, Exception("database or disk is full"))
DEAD_BUCKET = StoreUnavailable("Found.", expected="expected.", advice="Advice.")


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.worker.PAUSE_SECONDS", 0.02)
    monkeypatch.setattr("app.jobs.worker.MAX_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr("app.jobs.maintenance.FAULT_DELAY_SECONDS", 0.02)
    monkeypatch.setattr("app.jobs.maintenance.MAX_FAULT_DELAY_SECONDS", 0.1)
    monkeypatch.setattr("app.jobs.maintenance.HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr("app.jobs.workflow.STUCK_SECONDS", 0.5)


class Broken:
    """A method that raises an error in some of its calls while the fault lasts."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: object, name: str, error: Exception, calls: int) -> None:
        self.failed = 0
        method: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.failed < calls:
                self.failed += 1
                raise error
            return method(*args, **kwargs)

        patch.setattr(owner, name, call)


class FaultyEngine(FakeEngine):
    """An engine whose first inferences raise an error."""

    def __init__(self, error: Exception, failures: int) -> None:
        super().__init__()
        self.error, self.failures = error, failures
        self.warm_ups = 0

    def warm_up(self) -> None:
        self.warm_ups += 1

    def infer(self, scan: Path, out: Path, request: AnalysisRequest, progress: Progress) -> None:
        if self.failures:
            self.failures -= 1
            raise self.error
        super().infer(scan, out, request, progress)


class FullDiskEngine(FakeEngine):
    """An engine that meets a full disk in its first export, and replaces the error as a reader does."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = Path(marker)

    def export(self, *arguments: Any) -> Any:
        if not self.marker.exists():
            self.marker.touch()
            try:
                raise FULL_DISK
            except OSError:
                raise TruncatedFile("Found.", expected="expected.", advice="Advice.") from None
        return super().export(*arguments)


def raised_from(error: Exception) -> Exception:
    """Return an error of a reader that hides another error."""
    try:
        try:
            raise error
        except OSError:
            raise InvalidHeader("Found.", expected="expected.", advice="Advice.") from None
    except InvalidHeader as hidden:
        return hidden


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (FULL_DISK, StoreFull),
        (raised_from(FULL_DISK), StoreFull),
        (OSError(errno.EMFILE, "Too many open files"), NotReady),
        (raised_from(OSError(errno.EIO, "Input/output error")), StoreUnavailable),
        (PermissionError(errno.EACCES, "Permission denied"), StoreUnavailable),
        (DEAD_BUCKET, StoreUnavailable),
        (DamagedBundle("Found.", expected="expected.", advice="Advice."), DamagedBundle),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (raised_from(OSError("a library has no number")), None),
        (TruncatedFile("Found.", expected="expected.", advice="Advice."), None),
        (ValueError("Zweistein"), None),
    ],
)
def test_fault_of_the_service_is_told_from_a_fault_of_the_scan(
    error: Exception, fault: type[CounterpartError] | None
) -> None:
    found = find_service_fault(error)
    assert type(found) is (fault or type(None))
    assert "device" not in str(found)


WRITES = [
    (Store, "create_work_folder", FULL_DISK),
    (Store, "scan_path", DEAD_BUCKET),
    (Store, "save_intermediate", FULL_DISK),
    (Store, "load_intermediate", DEAD_BUCKET),
    (Store, "stage", DEAD_BUCKET),
    (Store, "publish", FULL_DISK),
    (Store, "publish", DEAD_BUCKET),
    (WorkerRegistry, "is_quarantined", FULL_DATABASE),
    (JobService, "is_assigned", FULL_DATABASE),
    (JobService, "record_progress", FULL_DATABASE),
    (SystemDatabase, "record_operation_result", FULL_DATABASE),
    (SystemDatabase, "update_workflow_attributes", FULL_DATABASE),
    (SystemDatabase, "update_workflow_outcome", FULL_DATABASE),
    (Metrics, "text", ValueError()),  # never called: the undisturbed case
]


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize(("owner", "name", "error"), WRITES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_job_survives_a_fault_at_each_write(
    owner: type, name: str, error: Exception, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_service(tmp_path, FakeEngine()) as service:
        broken = Broken(monkeypatch, owner, name, error, calls)
        job, other = submit(service, tmp_path), submit(service, tmp_path, name="other")
        for each in (job, other):
            wait_for_state(service, each, "succeeded")
            assert sorted(path.name for path in (tmp_path / "jobs" / each).iterdir()) == ["results", "scan"]
        assert broken.failed == (0 if owner is Metrics else calls)
        wait_for_health(service)
        if owner is not Metrics:
            assert service.queue.get(job).problem is None


def test_disk_that_is_full_for_a_while_leaves_no_job_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write of the running job fails, its outcome and its return to the queue included."""
    names = ("record_operation_result", "update_workflow_attributes", "update_workflow_outcome")
    with running_service(tmp_path, FakeEngine()) as service:
        job = submit(service, tmp_path, seconds=0.5)
        wait_for_state(service, job, "running")
        with monkeypatch.context() as patch:
            for name in names:
                Broken(patch, SystemDatabase, name, FULL_DATABASE, 1000)
            for name in ("save_intermediate", "check"):
                Broken(patch, Store, name, FULL_DISK, 1000)
            Broken(patch, workflow, "return_job", FULL_DATABASE, 1000)
            time.sleep(2)
            assert service.health.fault is not None
        wait_for_state(service, job, "succeeded")
        wait_for_health(service)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DamagedBundle("Found.", expected="expected.", advice="Advice."), "damaged_bundle"),
        (OSError(errno.EMFILE, "Too many open files"), "not_ready"),
        (DEAD_BUCKET, "store_unavailable"),
    ],
)
def test_job_fails_after_many_faults_and_the_worker_goes_on(error: Exception, code: str, tmp_path: Path) -> None:
    engine = FaultyEngine(error, MAX_FAULTS)
    with running_service(tmp_path, engine) as service:
        job = submit(service, tmp_path)
        assert problem_of(service, job)["code"] == code
        assert engine.failures == 0
        assert (engine.warm_ups > 0) == (code != "store_unavailable")
        assert service.queue.get(job).state == "failed"
        good = submit(service, tmp_path, name="good")
        wait_for_state(service, good, "succeeded")
        assert f'counterpart_service_faults_total{{code="{code}"}}' in service.queue.metrics().decode()


def test_worker_pauses_and_says_why_until_the_store_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    with running_service(tmp_path, engine) as service:
        with monkeypatch.context() as patch:
            for name in ("scan_path", "check"):
                Broken(patch, Store, name, DEAD_BUCKET, 1000)
            jobs = [submit(service, tmp_path, name=number) for number in range(3)]
            while service.health.fault is None:
                time.sleep(0.01)
            time.sleep(1)
            with pytest.raises(StoreUnavailable):
                service.health.check()
            assert [service.queue.get(job).state for job in jobs] == ["queued"] * 3
        for job in jobs:
            wait_for_state(service, job, "succeeded")
        assert service.health.fault is None


def test_job_is_not_tried_while_the_models_cannot_be_used(tmp_path: Path) -> None:
    engine = FaultyEngine(DEAD_BUCKET, 0)
    with running_service(tmp_path, engine) as service:
        service.health.fault = DamagedBundle("Found.", expected="expected.", advice="Advice.")
        job = submit(service, tmp_path)
        wait_for_state(service, job, "succeeded")
        assert engine.warm_ups == len(engine.inferences) == 1


def test_paused_worker_stops_at_once_and_its_job_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.worker.PAUSE_SECONDS", 60)
    monkeypatch.setattr("app.jobs.worker.MAX_PAUSE_SECONDS", 60)
    with running_service(tmp_path, FaultyEngine(DEAD_BUCKET, 1)) as service:
        job = submit(service, tmp_path)
        while service.health.fault is None:
            time.sleep(0.01)
        start = time.monotonic()
    assert time.monotonic() - start < 20
    with running_service(tmp_path, FakeEngine()) as service:
        wait_for_state(service, job, "succeeded")


def test_hidden_fault_in_the_child_process_is_found(tmp_path: Path) -> None:
    arguments = {"marker": str(tmp_path / "marker")}
    engine = SubprocessEngine(FakeEngine(), f"{__name__}:FullDiskEngine", arguments)
    with running_service(tmp_path / "store", engine) as service:
        job = submit(service, tmp_path / "store")
        wait_for_state(service, job, "succeeded")
        assert 'faults_total{code="store_full"} 1.0' in service.queue.metrics().decode()


def test_unexpected_error_of_the_analysis_fails_the_scan_at_once(tmp_path: Path) -> None:
    with running_service(tmp_path, FaultyEngine(ValueError("Zweistein"), 1)) as service:
        assert problem_of(service, submit(service, tmp_path))["code"] == InternalError.code


def wait_for_health(service: JobService) -> None:
    """Wait until the worker has ended its pause."""
    deadline = time.monotonic() + 60
    while service.health.fault is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"models": "empty"}, NotReady), ({"provider": "cuda"}, ProviderUnavailable)],
)
def test_service_without_model_or_provider_does_not_start(
    settings: dict[str, str], error: type[CounterpartError], tiny_models: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    models = tmp_path / settings.pop("models") if "models" in settings else tiny_models
    with pytest.raises(error):
        serve(read_settings(models=models, store=str(tmp_path / "store"), port=0, **settings))
    assert not (tmp_path / "store" / "jobs.sqlite").exists()


def test_readiness_names_the_fault_that_pauses_the_worker(tmp_path: Path) -> None:
    app = create_app(read_settings(store=str(tmp_path)), FakeEngine())
    with TestClient(app, BASE_URL) as http:
        while http.get("/readyz").status_code != 200:
            time.sleep(0.05)
        app.state.services.worker_health.fault = DEAD_BUCKET
        answer = http.get("/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        assert http.get("/livez").status_code == 200
