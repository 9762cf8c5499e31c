import itertools
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.analysis import AnalysisRequest
from app.errors import NotReady, OutOfDistribution, OutOfMemory, TookTooLong, UnexpectedError, error_location
from app.export.outputs import REQUIRED_NAMES
from app.jobs.engine import INFERENCE_FILE, ChildProcessDied
from app.jobs.metrics import Metrics
from app.jobs.subprocess_engine import NICENESS, SubprocessEngine, free_memory
from app.jobs.worker import Interrupted
from tests.api.support import FakeEngine, fake_scan
from tests.jobs.support import problem_of, running_service, submit, wait_for_state

GIB = 1 << 30


class SmallMemoryEngine(FakeEngine):
    """An engine whose process may use only some more memory than at its start."""

    def __init__(self, spare: int) -> None:
        super().__init__()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))


class KilledInWarmUpEngine(FakeEngine):
    def warm_up(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class HangingEngine(FakeEngine):
    def warm_up(self) -> None:
        time.sleep(600)


@pytest.fixture
def fake_child() -> Iterator[SubprocessEngine]:
    """Return a fake engine in a child process."""
    engine = SubprocessEngine(FakeEngine(), "tests.api.support:FakeEngine", {})
    yield engine
    engine.close()


@pytest.fixture
def engine() -> Iterator[SubprocessEngine]:
    engine = SubprocessEngine(FakeEngine(), f"{__name__}:SmallMemoryEngine", {"spare": GIB})
    yield engine
    engine.close()


def analyse(
    engine: SubprocessEngine, folder: Path, *, stop_after: float = 1e9, **orders: object
) -> list[tuple[str, float]]:
    """Run both steps with orders for the fake engine, and return the reported progress."""
    (folder / "scan").write_bytes(fake_scan(**orders))
    reported = []
    start = time.monotonic()

    def progress(stage: str, fraction: float) -> None:
        reported.append((stage, fraction))
        if time.monotonic() - start > stop_after:
            raise Interrupted

    engine.infer(folder / "scan", folder, AnalysisRequest(seed=5), progress)
    report = engine.export(folder / "scan", folder / INFERENCE_FILE, folder, AnalysisRequest(seed=5), progress)
    assert (report.model.id, report.model.seed, report.lesion_volume_ml) == ("tiny-0.0.1", 5, 2.5)
    return reported


def child_pid(engine: SubprocessEngine) -> int:
    assert engine._child is not None
    return engine._child._process.pid


def test_scan_is_analysed_by_another_process(engine: SubprocessEngine, tmp_path: Path) -> None:
    engine.warm_up()
    pid = child_pid(engine)
    reported = analyse(engine, tmp_path, seconds=0.2)
    # The last progress is repeated while the child process is silent.
    assert [step for step in dict.fromkeys(reported) if step not in {("read", 0.0), ("export", 0.0)}] == [
        ("read", 1.0),
        *[("infer", step / 4) for step in range(4)],
        ("export", 1.0),
    ]
    assert (tmp_path / REQUIRED_NAMES[0]).read_bytes() == REQUIRED_NAMES[0].encode() * 10
    assert child_pid(engine) == pid != os.getpid()
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(os.nice(0) + NICENESS, 19)


def test_errors_of_the_child_are_raised_in_the_parent(engine: SubprocessEngine, tmp_path: Path) -> None:
    with pytest.raises(OutOfDistribution, match=r"^Found\. Expected: expected\. Advice\.$"):
        analyse(engine, tmp_path, raise_error="OutOfDistribution")
    with pytest.raises(UnexpectedError) as caught:
        analyse(engine, tmp_path, raise_value_error="Zweistein")
    location = error_location(caught.value)
    assert location["exception"] == "ValueError"
    assert location["where"].startswith("support.py:")
    assert "Zweistein" not in str(caught.value)


def test_out_of_memory_ends_one_scan_and_frees_its_memory(engine: SubprocessEngine, tmp_path: Path) -> None:
    analyse(engine, tmp_path, allocate_bytes=GIB // 2)
    pid = child_pid(engine)
    with pytest.raises(OutOfMemory):
        analyse(engine, tmp_path, allocate_bytes=2 * GIB)
    assert not Path(f"/proc/{pid}").exists()
    analyse(engine, tmp_path, name="the next")
    used = int(Path(f"/proc/{child_pid(engine)}/statm").read_text().split()[1]) * resource.getpagesize()
    assert used < GIB // 2


def test_dead_child_is_reported_and_replaced(engine: SubprocessEngine, tmp_path: Path) -> None:
    with pytest.raises(ChildProcessDied, match="status 9"):
        analyse(engine, tmp_path, exit_process=True)
    analyse(engine, tmp_path, name="the next")
    os.kill(child_pid(engine), signal.SIGKILL)  # between two scans
    time.sleep(0.2)
    analyse(engine, tmp_path, name="the one after")


def test_child_that_dies_in_warm_up_is_not_ready() -> None:
    engine = SubprocessEngine(FakeEngine(), f"{__name__}:KilledInWarmUpEngine", {})
    with pytest.raises(NotReady, match="signal 9"):
        engine.warm_up()
    engine.close()


def test_interrupted_scan_stops_at_once(engine: SubprocessEngine, tmp_path: Path) -> None:
    engine.warm_up()
    pid = child_pid(engine)
    start = time.monotonic()
    with pytest.raises(Interrupted):
        analyse(engine, tmp_path, seconds=60, stop_after=0.3)
    # The child process stopped by itself, and keeps its models.
    assert child_pid(engine) == pid
    with pytest.raises(Interrupted):
        analyse(engine, tmp_path, ignore_messages_seconds=60, stop_after=0.3)
    assert engine._child is None
    assert time.monotonic() - start < 30
    analyse(engine, tmp_path, name="the next")


def test_child_exits_when_its_parent_exits(engine: SubprocessEngine) -> None:
    engine.warm_up()
    assert engine._child is not None
    os.kill(child_pid(engine), signal.SIGTERM)  # ignored, because a process supervisor signals all processes
    engine.warm_up()
    engine._child._connection.close()  # as the system does when the parent exits
    assert engine._child._process.wait(30) == 0


def test_memory_limit_keeps_a_scan_from_using_all_memory(fake_child: SubprocessEngine, tmp_path: Path) -> None:
    for _ in range(2):  # every scan has a limit, the first one too
        analyse(fake_child, tmp_path, allocate_bytes=GIB // 8)
        with pytest.raises(OutOfMemory):
            analyse(fake_child, tmp_path, allocate_bytes=int(0.9 * free_memory()))


@pytest.mark.parametrize("orders", [{"seconds": 60}, {"ignore_messages_seconds": 60}, {"export_seconds": 60}])
def test_scan_that_takes_too_long_is_stopped(
    fake_child: SubprocessEngine, tmp_path: Path, orders: dict[str, float]
) -> None:
    fake_child.warm_up()
    fake_child._deadline_seconds = 1.0
    pid, start = child_pid(fake_child), time.monotonic()
    with pytest.raises(TookTooLong, match="after 1 seconds"):
        analyse(fake_child, tmp_path, **orders)
    assert time.monotonic() - start < 20
    assert not Path(f"/proc/{pid}").exists()
    fake_child._deadline_seconds = 120.0
    analyse(fake_child, tmp_path, name="the next")


def test_time_in_which_the_machine_was_suspended_does_not_count(
    fake_child: SubprocessEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_child.warm_up()
    fake_child._deadline_seconds = 30.0
    hours = itertools.count()

    def clock() -> float:
        """Return a time that jumps by an hour at each call."""
        return time.perf_counter() + 3600 * next(hours)

    monkeypatch.setattr("app.jobs.subprocess_engine.time", SimpleNamespace(monotonic=clock))
    analyse(fake_child, tmp_path, seconds=0.1)


def test_suspended_child_is_replaced(
    fake_child: SubprocessEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.jobs.subprocess_engine.SUSPENDED_SECONDS", 0.5)
    fake_child.warm_up()
    pid = child_pid(fake_child)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ChildProcessDied, match=f"signal {int(signal.SIGSTOP)}"):
        analyse(fake_child, tmp_path)
    assert not Path(f"/proc/{pid}").exists()
    analyse(fake_child, tmp_path, name="the next")


def test_child_that_hangs_in_warm_up_is_not_ready() -> None:
    engine = SubprocessEngine(FakeEngine(), f"{__name__}:HangingEngine", {}, deadline_seconds=1.0)
    with pytest.raises(NotReady, match="took too long"):
        engine.warm_up()
    engine.close()


def test_job_whose_scan_takes_too_long_fails_and_the_worker_goes_on(tmp_path: Path) -> None:
    engine = SubprocessEngine(FakeEngine(), "tests.api.support:FakeEngine", {}, deadline_seconds=3.0)
    with running_service(tmp_path, engine) as service:
        slow = submit(service, tmp_path, seconds=60)
        good = submit(service, tmp_path, name="good")
        assert problem_of(service, slow)["code"] == "took_too_long"
        wait_for_state(service, good, "succeeded")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "max"}, 8000),
        ({}, 8000),
        ({"memory.max": "4096000", "memory.current": "3072000", "memory.stat": "anon 9\ninactive_file 512000"}, 1500),
        ({"memory.max": "4096000", "memory.current": "5000000", "memory.stat": "anon 9"}, 0),
    ],
)
def test_free_memory_respects_the_limit_of_the_container(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable: 8000 kB\n")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path, tmp_path) == expected * 1024


def test_scan_that_crashes_twice_is_quarantined_and_victims_of_kills_are_not(tmp_path: Path) -> None:
    engine = SubprocessEngine(FakeEngine(), f"{__name__}:SmallMemoryEngine", {"spare": GIB})
    with running_service(tmp_path, engine) as service:
        crashing = submit(service, tmp_path, exit_process=True, seconds=1)
        victim = submit(service, tmp_path, name="victim")
        for number in range(5):
            service._registry.record_crash(f"killed by hand {number}", [victim])
        problem = problem_of(service, crashing)
        assert problem["code"] == "worker_lost"
        assert "2 times" in problem["found"]
        wait_for_state(service, victim, "succeeded")
        hungry = submit(service, tmp_path, allocate_bytes=2 * GIB)
        assert problem_of(service, hungry)["code"] == "out_of_memory"


def test_metrics_of_the_child_process(fake_child: SubprocessEngine) -> None:
    metrics = Metrics()
    metrics.observe_child(fake_child.child_pid)
    assert b"counterpart_inference_process" not in metrics.text()  # no child process runs yet
    fake_child.warm_up()
    text = metrics.text().decode()
    memory = re.findall(r"^counterpart_inference_process_resident_memory_bytes ([\d.e+]+)$", text, re.MULTILINE)
    assert [float(number) > 1e6 for number in memory] == [True]
    assert "counterpart_inference_process_cpu_seconds_total" in text
