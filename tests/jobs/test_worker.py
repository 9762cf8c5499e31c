import threading
import time
from pathlib import Path

import pytest

from app.analysis import AnalysisRequest
from app.errors import StoreFull, error_location
from app.export.outputs import REQUIRED_NAMES
from app.jobs.metrics import Metrics
from app.jobs.store import Store
from app.jobs.worker import Interrupted, StepOutput, Worker
from tests.api.support import FakeEngine, fake_scan
from tests.jobs.support import JOB, commit_scan


class FakeJobControl:
    """A state in memory, which withdraws the job after some checks."""

    def __init__(self, checks: int = 1000) -> None:
        self.checks = checks
        self.crashes = 0
        self.progress: list[tuple[str, float]] = []

    def is_assigned(self, job: str) -> bool:
        assert job == JOB
        self.checks -= 1
        return self.checks >= 0

    def check_database(self) -> None:
        pass

    def record_child_crash(self, job: str) -> int:
        assert job == JOB
        self.crashes += 1
        return self.crashes if self.crashes == 2 else 0

    def record_progress(self, job: str, stage: str, progress: float) -> None:
        assert job == JOB
        self.progress.append((stage, progress))


def make_worker(folder: Path, state: FakeJobControl, **orders: object) -> Worker:
    store = Store(folder)
    commit_scan(store, JOB, fake_scan(**orders))
    return Worker(FakeEngine(), store, state, Metrics())


def run_job(worker: Worker) -> StepOutput:
    """Run both steps, and return the output of the last one or of the failed one."""
    with worker.start_attempt(JOB, AnalysisRequest()) as attempt:
        output = attempt.infer()
        return output if "problem" in output else attempt.export(str(output["inferred"]))


def test_progress_covers_the_whole_job(tmp_path: Path) -> None:
    state = FakeJobControl()
    output = run_job(make_worker(tmp_path, state))
    assert state.progress == [("read", 0.05), ("infer", 0.05), ("export", 0.95)]
    assert output["model"] == "tiny-0.0.1"
    assert output["results"] == [*REQUIRED_NAMES]
    assert (tmp_path / "jobs" / JOB / str(output["work"]) / "mask.nii.gz").is_file()


def test_problem_of_an_unexpected_exception_has_its_class_and_not_its_text(tmp_path: Path) -> None:
    output = run_job(make_worker(tmp_path, FakeJobControl(), raise_value_error="Zweistein"))
    assert "Zweistein" not in str(output)
    assert "ValueError" in str(output["problem"])


@pytest.mark.parametrize("orders", [{"seconds": 60}, {"fail": "Cancelled"}])
def test_cancelled_job_stops_early_and_leaves_only_its_scan(tmp_path: Path, orders: dict[str, object]) -> None:
    start = time.monotonic()
    with pytest.raises(Interrupted):
        run_job(make_worker(tmp_path, FakeJobControl(checks=2), **orders))
    assert time.monotonic() - start < 45
    assert [path.name for path in (tmp_path / "jobs" / JOB).iterdir()] == ["scan"]


def test_exception_after_an_erasure_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_job(make_worker(tmp_path, FakeJobControl(checks=1), raise_value_error="the folder is gone"))


@pytest.mark.parametrize(("drain_seconds", "finishes"), [(50.0, True), (0.0, False)])
def test_stop_waits_for_the_running_job(tmp_path: Path, drain_seconds: float, finishes: bool) -> None:  # noqa: FBT001
    worker = make_worker(tmp_path, FakeJobControl(), seconds=0.5 if finishes else 60)
    outputs: list[object] = []

    def run() -> None:
        try:
            outputs.append(run_job(worker))
        except Interrupted:
            outputs.append(None)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.2)
    worker.stop(drain_seconds)
    thread.join(40)
    assert [output is not None for output in outputs] == [finishes]
    with pytest.raises(Interrupted):  # no new attempt starts
        run_job(worker)


def test_error_location_has_no_text() -> None:
    with pytest.raises(ValueError, match="Zweistein") as caught:
        int("Zweistein")
    location = error_location(caught.value)
    assert location["exception"] == "ValueError"
    assert location["where"].startswith("test_worker.py:")
    assert "Zweistein" not in str(location)


def test_memory_error_is_reported_as_out_of_memory(tmp_path: Path) -> None:
    output = run_job(make_worker(tmp_path, FakeJobControl(), allocate_bytes=1 << 60))
    assert "'out_of_memory'" in str(output["problem"])


def test_pause_after_very_many_faults_has_its_largest_value(tmp_path: Path) -> None:
    worker = Worker(FakeEngine(), Store(tmp_path / "store"), FakeJobControl(), Metrics())
    worker._faults_in_a_row = 2000
    worker._draining.set()
    worker.pause(StoreFull("Found.", expected="expected.", advice="Advice."))
    assert worker.health.fault is None
