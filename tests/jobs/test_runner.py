import threading
import time
from pathlib import Path

import pytest

from app.analysis import AnalysisRequest
from app.export.outputs import REQUIRED_NAMES
from app.jobs.metrics import Metrics
from app.jobs.runner import Interrupted, Outcome, Runner, where
from app.jobs.store import Store
from tests.api.support import FakeEngine, scan
from tests.jobs.test_store import JOB, fill


class Paper:
    """A ledger that remembers, and forgets the job after so many questions."""

    def __init__(self, wanted: int = 1000) -> None:
        self.left = wanted
        self.deaths = 0
        self.notes: list[tuple[str, float]] = []

    def wanted(self, job: str) -> bool:
        assert job == JOB
        self.left -= 1
        return self.left >= 0

    def suspected(self, job: str) -> bool:
        assert job == JOB
        return self.deaths > 0

    def killed(self, job: str) -> int:
        assert job == JOB
        self.deaths += 1
        return self.deaths if self.deaths == 2 else 0

    def note(self, job: str, stage: str, progress: float) -> None:
        assert job == JOB
        self.notes.append((stage, progress))


def runner(folder: Path, ledger: Paper, **orders: object) -> Runner:
    store = Store(folder)
    fill(store, JOB, scan(**orders))
    return Runner(FakeEngine(), store, ledger, Metrics())


def analyse(worker: Runner) -> Outcome:
    """Both steps of a job, or the one that failed."""
    with worker.begin(JOB, AnalysisRequest()) as attempt:
        outcome = attempt.infer()
        return outcome if "problem" in outcome else attempt.export(str(outcome["inferred"]))


def test_progress_runs_over_the_whole_job(tmp_path: Path) -> None:
    ledger = Paper()
    outcome = analyse(runner(tmp_path, ledger))
    assert ledger.notes == [("read", 0.05), ("infer", 0.05), ("export", 0.95)]
    assert outcome["model"] == "tiny-0.0.1"
    assert outcome["results"] == [*REQUIRED_NAMES]
    assert (tmp_path / "jobs" / JOB / str(outcome["work"]) / "mask.nii.gz").is_file()


def test_a_fault_is_told_by_its_class_alone(tmp_path: Path) -> None:
    outcome = analyse(runner(tmp_path, Paper(), crash="Zweistein"))
    assert "Zweistein" not in str(outcome)
    assert "ValueError" in str(outcome["problem"])


@pytest.mark.parametrize("orders", [{"seconds": 60}, {"fail": "Cancelled"}])
def test_what_nobody_wants_is_left_long_before_its_end(tmp_path: Path, orders: dict[str, object]) -> None:
    start = time.monotonic()
    with pytest.raises(Interrupted):
        analyse(runner(tmp_path, Paper(wanted=2), **orders))
    assert time.monotonic() - start < 45
    assert [path.name for path in (tmp_path / "jobs" / JOB).iterdir()] == ["scan"]


def test_a_fault_after_the_erasure_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        analyse(runner(tmp_path, Paper(wanted=1), crash="the folder is gone"))


@pytest.mark.parametrize(("drain", "ends"), [(50.0, True), (0.0, False)])
def test_stopping_waits_a_while(tmp_path: Path, drain: float, ends: bool) -> None:  # noqa: FBT001
    worker = runner(tmp_path, Paper(), seconds=0.5 if ends else 60)
    outcomes: list[object] = []

    def work() -> None:
        try:
            outcomes.append(analyse(worker))
        except Interrupted:
            outcomes.append(None)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.2)
    worker.stop(drain)
    thread.join(40)
    assert [outcome is not None for outcome in outcomes] == [ends]
    # What the queue still hands out is not begun.
    with pytest.raises(Interrupted):
        analyse(worker)


def test_a_place_has_no_text() -> None:
    with pytest.raises(ValueError, match="Zweistein") as caught:
        int("Zweistein")
    assert where(caught.value)["exception"] == "ValueError"
    assert where(caught.value)["where"].startswith("test_runner.py:")
    assert "Zweistein" not in str(where(caught.value))


def test_memory_that_runs_out_beside_the_networks_is_told_as_such(tmp_path: Path) -> None:
    outcome = analyse(runner(tmp_path, Paper(), hungry=1 << 60))
    assert "'out_of_memory'" in str(outcome["problem"])
