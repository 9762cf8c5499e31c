"""Inference in a process of its own: what a scan does to it, it does to that scan alone."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.analysis import AnalysisRequest
from app.errors import NotReady, OutOfDistribution, OutOfMemory
from app.export.outputs import REQUIRED_NAMES
from app.jobs.apart import Apart
from app.jobs.child import NICENESS, free_memory
from app.jobs.engine import INFERRED, ProcessDied, Unexpected
from app.jobs.runner import Interrupted, where
from tests.api.support import FakeEngine, scan
from tests.jobs.test_workflow import started, submit, until

GIB = 1 << 30


class Poor(FakeEngine):
    """An engine in a process that may have so much memory and no more."""

    def __init__(self, spare: int) -> None:
        super().__init__()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))


class Stillborn(FakeEngine):
    """One that does not survive its models."""

    def warm_up(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def apart() -> Iterator[Apart]:
    made = Apart(FakeEngine(), "tests.jobs.test_apart:Poor", {"spare": GIB})
    yield made
    made.close()


def analyse(engine: Apart, folder: Path, *, stop_after: float = 1e9, **orders: object) -> list[tuple[str, float]]:
    (folder / "scan").write_bytes(scan(**orders))
    told = []
    begin = time.monotonic()

    def progress(stage: str, fraction: float) -> None:
        told.append((stage, fraction))
        if time.monotonic() - begin > stop_after:
            raise Interrupted

    engine.infer(folder / "scan", folder, AnalysisRequest(seed=5), progress)
    report = engine.export(folder / "scan", folder / INFERRED, folder, AnalysisRequest(seed=5), progress)
    assert (report.model.id, report.model.seed, report.lesion_volume_ml) == ("tiny-0.0.1", 5, 2.5)
    return told


def child(engine: Apart) -> int:
    assert engine._child is not None
    return engine._child._process.pid


def test_a_scan_is_analysed_by_another_process(apart: Apart, tmp_path: Path) -> None:
    apart.warm_up()
    first = child(apart)
    told = analyse(apart, tmp_path, seconds=0.2)
    # Where the child is silent for long, it is told again how far the scan is.
    assert [step for step in dict.fromkeys(told) if step not in {("read", 0.0), ("export", 0.0)}] == [
        ("read", 1.0),
        *[("infer", step / 4) for step in range(4)],
        ("export", 1.0),
    ]
    assert (tmp_path / REQUIRED_NAMES[0]).read_bytes() == REQUIRED_NAMES[0].encode() * 10
    assert child(apart) == first != os.getpid()
    assert os.getpriority(os.PRIO_PROCESS, first) == min(os.nice(0) + NICENESS, 19)


def test_errors_are_those_that_were_raised(apart: Apart, tmp_path: Path) -> None:
    with pytest.raises(OutOfDistribution, match=r"^Found\. Expected: expected\. Advice\.$"):
        analyse(apart, tmp_path, fail="OutOfDistribution")
    with pytest.raises(Unexpected) as caught:
        analyse(apart, tmp_path, crash="Zweistein")
    assert where(caught.value)["exception"] == "ValueError"
    assert where(caught.value)["where"].startswith("support.py:")
    assert "Zweistein" not in str(caught.value)


def test_out_of_memory_fails_one_scan_and_what_it_held_is_given_back(apart: Apart, tmp_path: Path) -> None:
    analyse(apart, tmp_path, hungry=GIB // 2)
    first = child(apart)
    with pytest.raises(OutOfMemory):
        analyse(apart, tmp_path, hungry=2 * GIB)
    assert not Path(f"/proc/{first}").exists()
    analyse(apart, tmp_path, name="the next")
    held = int(Path(f"/proc/{child(apart)}/statm").read_text().split()[1]) * resource.getpagesize()
    assert held < GIB // 2


def test_a_death_is_seen_and_another_child_takes_its_place(apart: Apart, tmp_path: Path) -> None:
    with pytest.raises(ProcessDied, match="status 9"):
        analyse(apart, tmp_path, die=True)
    analyse(apart, tmp_path, name="the next")
    os.kill(child(apart), signal.SIGKILL)  # between two scans: nobody's fault
    time.sleep(0.2)
    analyse(apart, tmp_path, name="the one after")


def test_a_child_that_dies_over_its_models_is_told() -> None:
    engine = Apart(FakeEngine(), "tests.jobs.test_apart:Stillborn", {})
    with pytest.raises(NotReady, match="signal 9"):
        engine.warm_up()
    engine.close()


def test_who_is_not_wanted_stops_at_once(apart: Apart, tmp_path: Path) -> None:
    apart.warm_up()
    first = child(apart)
    start = time.monotonic()
    with pytest.raises(Interrupted):
        analyse(apart, tmp_path, seconds=60, stop_after=0.3)
    # It had time to stop by itself, and is kept with its models.
    assert child(apart) == first
    with pytest.raises(Interrupted):
        analyse(apart, tmp_path, deaf=60, stop_after=0.3)
    assert apart._child is None
    assert time.monotonic() - start < 30
    analyse(apart, tmp_path, name="the next")


def test_the_child_ends_with_its_parent_however_that_ended(apart: Apart) -> None:
    apart.warm_up()
    assert apart._child is not None
    os.kill(child(apart), signal.SIGTERM)  # a supervisor that signals all: the parent decides
    apart.warm_up()
    apart._child._wire.close()  # as the system does
    assert apart._child._process.wait(30) == 0


def test_a_guarded_scan_cannot_take_what_the_worker_needs(tmp_path: Path) -> None:
    apart = Apart(FakeEngine(), "tests.api.support:FakeEngine", {})
    try:
        apart.guard(on=True)
        analyse(apart, tmp_path, hungry=GIB // 8)
        with pytest.raises(OutOfMemory):
            analyse(apart, tmp_path, hungry=int(0.9 * free_memory()))
        apart.guard(on=False)
        analyse(apart, tmp_path, hungry=int(0.9 * free_memory()))
    finally:
        apart.close()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "max"}, 8000),
        ({}, 8000),
        ({"memory.max": "4096000", "memory.current": "3072000", "memory.stat": "anon 9\ninactive_file 512000"}, 1500),
        ({"memory.max": "4096000", "memory.current": "5000000", "memory.stat": "anon 9"}, 0),
    ],
)
def test_free_memory_is_that_of_the_container(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable: 8000 kB\n")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path, tmp_path) == expected * 1024


def test_a_scan_that_kills_its_worker_twice_is_parked_and_another_that_was_killed_is_not(tmp_path: Path) -> None:
    engine = Apart(FakeEngine(), "tests.jobs.test_apart:Poor", {"spare": GIB})
    with started(tmp_path, engine) as jobs:
        killer = submit(jobs, tmp_path, die=True, seconds=1)
        unlucky = submit(jobs, tmp_path, name="unlucky")
        for death in range(5):
            jobs._roster.lost(f"killed by hand {death}", [unlucky])
        until(jobs, killer, "failed")
        problem = jobs.get(killer).problem
        assert problem is not None
        assert (problem["code"], problem["found"]) == ("worker_lost", "2 workers died while they analysed this scan.")
        until(jobs, unlucky, "succeeded")
        assert engine._guard
        hungry = submit(jobs, tmp_path, hungry=2 * GIB)
        until(jobs, hungry, "failed")
        problem = jobs.get(hungry).problem
        assert problem is not None
        assert problem["code"] == "out_of_memory"
        assert not engine._guard
