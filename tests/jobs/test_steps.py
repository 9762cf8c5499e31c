"""Infer, export, publish: who dies between them has the others go on, and nothing of it is left behind."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa

from app.analysis import AnalysisRequest
from app.export.outputs import DICOM_NAMES, REQUIRED_NAMES
from app.jobs.apart import Apart
from app.jobs.bucket import BucketStore
from app.jobs.database import connect, recorded_steps, workflow_status
from app.jobs.engine import INFERRED, BundleEngine
from app.jobs.listing import WORKFLOW
from app.jobs.store import HELD, Store
from app.jobs.upgrade import begin_again
from app.jobs.workflow import Jobs
from scripts.servers import BUCKET
from tests.api.served import served
from tests.api.support import FakeEngine
from tests.api.test_served import URL, until
from tests.jobs.test_workflow import started, submit
from tests.jobs.test_workflow import until as reached
from tests.support.dicom import write_series, zipped
from tests.support.phantom import brain, grid, with_lesion

SHAPE = (58, 70, 52)
RESULTS = (*REQUIRED_NAMES, *DICOM_NAMES)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DICOM series in a zip: to read it again is to unpack it again."""
    folder = tmp_path_factory.mktemp("series")
    volume = with_lesion(brain(SHAPE, grid(SHAPE)), (25.0, 10.0, 20.0), 15.0)
    return zipped(folder / "series.zip", write_series(folder / "series", volume))


@pytest.fixture(scope="module")
def calm(archive: Path, tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Results of the undisturbed run, whose export goes on from memory."""
    folder = tmp_path_factory.mktemp("calm")
    with served(folder / "store", folder / "log", process("calm"), models=str(tiny_models)) as service:
        job = send(service.http, archive)
        until(service.http, job, "succeeded")
        return published(service.http, job)


def process(kind: str, *role: str) -> Sequence[str]:
    """See `tests.jobs.interrupted`."""
    return (sys.executable, "-m", "tests.jobs.interrupted", kind, *role)


def send(http: httpx2.Client, archive: Path) -> str:
    answer = http.post(URL, content=archive.read_bytes())
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def published(http: httpx2.Client, job: str) -> dict[str, bytes]:
    return {name: http.get(f"{URL}/{job}/{name}").raise_for_status().content for name in RESULTS}


def within(folder: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in folder.iterdir())


def test_a_worker_killed_before_the_export_has_its_scan_exported_without_the_networks(
    archive: Path, calm: dict[str, bytes], tiny_models: Path, tmp_path: Path
) -> None:
    store, log, models = tmp_path / "store", tmp_path / "log", str(tiny_models)
    with served(store, log, process("killed"), models=models) as service:
        job = send(service.http, archive)
        assert service.process.wait(120) == -9
    assert within(store / "jobs" / job) == ["inferred", "scan", "work"]
    with served(store, log, process("networkless"), models=models) as service:
        until(service.http, job, "succeeded")
        assert published(service.http, job) == calm
        assert within(store / "jobs" / job) == ["results", "scan"]
        # And it could indeed not have inferred.
        other = service.http.post(f"{URL}?seed=1", content=archive.read_bytes()).json()["id"]
        until(service.http, other, "failed")
    assert '"exception": "AssertionError"' in log.read_text()


@pytest.fixture
def shared(database: str, server: dict[str, str], tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Settings of every machine of a cluster."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    return {"database": database, "store": f"s3://{BUCKET}/steps", "models": str(tiny_models)}


@pytest.mark.proof
def test_another_machine_exports_what_a_killed_one_inferred(
    archive: Path, calm: dict[str, bytes], shared: dict[str, str], tmp_path: Path
) -> None:
    bucket = BucketStore(shared["store"], tmp_path / "looks")

    def machine(name: str, *command: str):  # type: ignore[no-untyped-def]
        return served(tmp_path / name, tmp_path / f"{name}.log", process(*command), None, **shared)

    with machine("api", "calm", "--no-worker") as api:
        with machine("first", "killed", "--no-api") as first:
            job = send(api.http, archive)
            assert first.process.wait(120) == -9
        (held,) = bucket._names(f"jobs/{job}/inferred/")
        assert bucket.sizes()[job] > 1_000_000
        with machine("second", "networkless", "--no-api"):
            until(api.http, job, "succeeded")
            assert published(api.http, job) == calm
            assert held not in bucket._names("")
            assert not list((tmp_path / "second").rglob(f"{HELD}*"))
        assert api.http.delete(f"{URL}/{job}").status_code == 204
    assert bucket._names("") == []


def exporting(jobs: Jobs, engine: FakeEngine, folder: Path, times: int = 1) -> str:
    """A job that is at its export, and will be for long."""
    job = submit(jobs, folder, slow_export=60)
    deadline = time.monotonic() + 120
    while len(engine.exported) < times:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert within(folder / "jobs" / job) == ["inferred", "scan", "work"]
    return job


@pytest.mark.parametrize(("kept", "inferences"), [(True, 1), (False, 2)])
def test_a_drained_export_goes_on_at_the_next_start_and_infers_only_what_is_lost(
    tmp_path: Path,
    kept: bool,  # noqa: FBT001
    inferences: int,
) -> None:
    engine = FakeEngine()
    with started(tmp_path, engine) as jobs:
        job = exporting(jobs, engine, tmp_path)
    assert within(tmp_path / "jobs" / job) == ["inferred", "scan"]
    if not kept:  # the store was restored from a copy that is older than the database's
        Store(tmp_path).release(job)
    engine.slow_export = False
    with started(tmp_path, engine) as jobs:
        reached(jobs, job, "succeeded")
    assert len(engine.seen) == inferences
    assert [text for text, _ in engine.exported] == [f"{job} 1", f"{job} {inferences}"]
    assert within(tmp_path / "jobs" / job) == ["results", "scan"]


def test_a_job_that_is_cancelled_or_erased_in_its_export_leaves_nothing_of_it(tmp_path: Path) -> None:
    engine = FakeEngine()
    with started(tmp_path, engine) as jobs:
        cancelled = exporting(jobs, engine, tmp_path)
        jobs.cancel(cancelled)
        assert "inferred" not in within(tmp_path / "jobs" / cancelled)
        erased = exporting(jobs, engine, tmp_path, 2)  # so the worker has let go of the first
        assert within(tmp_path / "jobs" / cancelled) == ["scan"]
        jobs.erase(erased)
        assert not list(tmp_path.rglob(f"*{erased}*"))
        last = submit(jobs, tmp_path, name="last")
        reached(jobs, last, "succeeded")
        assert not list(tmp_path.rglob(f"*{erased}*"))
    assert not list(tmp_path.rglob(f"{HELD}*"))


def test_an_export_that_fails_leaves_nothing_of_it_and_is_not_inferred_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[str] = []
    hold = Store.hold

    def counted(store: Store, job: str, inferred: Path) -> str:
        held.append(job)
        return hold(store, job, inferred)

    monkeypatch.setattr(Store, "hold", counted)
    with started(tmp_path, Apart(FakeEngine(), "tests.api.support:FakeEngine", {})) as jobs:
        jobs_of = {"internal_error": submit(jobs, tmp_path, crash_late="x")}
        jobs_of["worker_lost"] = submit(jobs, tmp_path, die_late=True)
        for code, job in jobs_of.items():
            reached(jobs, job, "failed")
            problem = jobs.get(job).problem
            assert problem is not None
            assert problem["code"] == code
            assert within(tmp_path / "jobs" / job) == ["scan"]
        assert held == list(jobs_of.values())
        good = submit(jobs, tmp_path, name="good")
        reached(jobs, good, "succeeded")


def test_the_usual_export_reads_nothing_again(
    archive: Path, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, reads = BundleEngine(tiny_models, "cpu", 1), []

    def quiet(*_: object) -> None: ...

    def counted(*_: object, **__: object) -> None:
        reads.append("again")
        raise FileNotFoundError

    monkeypatch.setattr("app.jobs.engine.read", counted)
    engine.infer(archive, tmp_path, AnalysisRequest(), quiet)
    file = (tmp_path / INFERRED).rename(tmp_path / "held")
    engine.export(archive, file, tmp_path, AnalysisRequest(), quiet)
    assert reads == []
    assert within(tmp_path) == sorted(["held", *RESULTS])
    with pytest.raises(FileNotFoundError):  # nothing of it stays in memory
        engine.export(archive, file, tmp_path, AnalysisRequest(), quiet)
    assert reads == ["again"]


def test_what_other_steps_have_begun_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr("app.jobs.workflow.STEPS_VERSION", "older")
    with started(tmp_path, engine) as jobs:
        begun = exporting(jobs, engine, tmp_path)
        waiting = submit(jobs, tmp_path, name="waiting")
    engine.slow_export = False
    monkeypatch.undo()
    with started(tmp_path, engine) as jobs:
        for job in (waiting, begun):
            reached(jobs, job, "succeeded")
    # Its inference too, though the older code had recorded it.
    assert sorted(path.parents[1].name for path, _ in engine.seen) == sorted([begun, begun, waiting])
    assert within(tmp_path / "jobs" / begun) == ["results", "scan"]


def test_what_a_dead_worker_of_other_steps_held_begins_again_and_what_a_living_one_holds_does_not(
    tmp_path: Path,
) -> None:
    rows = {"dead": "w1", "living": "w2", "handed back": "w2"}
    with started(tmp_path, FakeEngine()) as jobs:
        held = {name: submit(jobs, tmp_path, name=name) for name in rows}
        for job in held.values():
            reached(jobs, job, "succeeded")
    database = connect(f"sqlite:///{tmp_path}/jobs.sqlite")
    table, steps = workflow_status(database), recorded_steps(database)
    with database.begin() as connection:
        for name, worker in rows.items():
            status = "ENQUEUED" if name == "handed back" else "PENDING"
            row = table.update().where(table.c.workflow_uuid == held[name])
            connection.execute(row.values(status=status, executor_id=worker, application_version="older"))
    assert begin_again(database, WORKFLOW, "2") == [held["handed back"]]
    assert begin_again(database, WORKFLOW, "2", "w1") == [held["dead"]]
    assert begin_again(database, WORKFLOW, "2", "w1") == []
    with database.connect() as connection:
        left = {*connection.execute(sa.select(steps.c.workflow_uuid)).scalars()}
        versions = dict(connection.execute(sa.select(table.c.workflow_uuid, table.c.application_version)).all())
    assert left == {held["living"]}
    assert versions == {held["living"]: "older", held["dead"]: "2", held["handed back"]: "2"}
