"""Behaviour that every engine has: on bundles, in a child process, and the fake engine of the tests."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.analysis import AnalysisRequest
from app.errors import CounterpartError
from app.export.outputs import DICOM_NAMES, REQUIRED_NAMES
from app.jobs.engine import INFERENCE_FILE, BundleEngine, Engine
from app.jobs.subprocess_engine import SubprocessEngine
from app.jobs.worker import Interrupted
from tests.api.support import FakeEngine, fake_scan
from tests.support.dicom import write_series, zip_files
from tests.support.phantom import brain, grid

SHAPE = (58, 70, 52)


def ignore_progress(_: str, __: float) -> None:
    pass


@dataclass
class EngineCase:
    """An engine, a scan that it accepts, and a scan that it refuses."""

    engine: Engine
    good: Path
    bad: Path


@pytest.fixture(params=["bundle", "subprocess", "fake"])
def case(
    request: pytest.FixtureRequest, tiny_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineCase]:
    folder = tmp_path_factory.mktemp("scans")
    good, bad = folder / "good", folder / "bad"
    if request.param == "fake":
        good.write_bytes(fake_scan())
        bad.write_bytes(fake_scan(raise_error="TruncatedFile"))
        engine: Engine = FakeEngine()
    else:
        zip_files(good, write_series(folder / "series", brain(SHAPE, grid(SHAPE))))
        bad.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
        engine = BundleEngine(tiny_models, "cpu", 1)
    if request.param == "subprocess":
        arguments = {"models": str(tiny_models), "provider": "cpu", "threads": 1}
        engine = SubprocessEngine(engine, "app.jobs.engine:BundleEngine", arguments)
    yield EngineCase(engine, good, bad)
    engine.close()


def test_engine_describes_its_models(case: EngineCase) -> None:
    assert case.engine.provider == "cpu"
    (manifest,) = case.engine.manifests
    assert manifest.name == "tiny"
    assert isinstance(case.engine.card(manifest.id), str | None)
    assert list(case.engine.profiles(manifest.id)) == []
    assert case.engine.settings_key == ""


def test_export_from_memory_and_from_the_file_give_the_same_results(case: EngineCase, tmp_path: Path) -> None:
    case.engine.warm_up()
    request, results = AnalysisRequest(seed=5), []
    work = tmp_path / "work"
    work.mkdir()
    case.engine.infer(case.good, work, request, ignore_progress)
    inferred = (work / INFERENCE_FILE).rename(tmp_path / "inferred")
    for out in (work, tmp_path / "again"):
        out.mkdir(exist_ok=True)
        report = case.engine.export(case.good, inferred, out, request, ignore_progress)
        assert report.model.seed == 5
        names = {path.name for path in out.iterdir()}
        assert names >= set(REQUIRED_NAMES)
        assert names <= {*REQUIRED_NAMES, *DICOM_NAMES}
        files = {path.name: path.read_bytes() for path in out.iterdir() if path.name in REQUIRED_NAMES[:3]}
        results.append((report.findings, report.scores, files))
    assert results[0] == results[1]


def test_refused_scan_raises_its_error(case: EngineCase, tmp_path: Path) -> None:
    with pytest.raises(CounterpartError) as caught:
        case.engine.infer(case.bad, tmp_path, AnalysisRequest(), ignore_progress)
    assert caught.value.code == "truncated_file"


def test_exception_of_the_callback_stops_the_inference(case: EngineCase, tmp_path: Path) -> None:
    def interrupt(_: str, __: float) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        case.engine.infer(case.good, tmp_path, AnalysisRequest(), interrupt)
    assert not (tmp_path / INFERENCE_FILE).exists()
    case.engine.infer(case.good, tmp_path, AnalysisRequest(), ignore_progress)
    assert (tmp_path / INFERENCE_FILE).is_file()


def test_bundle_engine_does_not_read_the_scan_twice(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = zip_files(tmp_path / "series.zip", write_series(tmp_path / "series", brain(SHAPE, grid(SHAPE))))
    engine, reads = BundleEngine(tiny_models, "cpu", 1), []
    work = tmp_path / "work"
    work.mkdir()

    def count(*_: object, **__: object) -> None:
        reads.append("read")
        raise FileNotFoundError

    monkeypatch.setattr("app.jobs.engine.read_requested_scan", count)
    engine.infer(archive, work, AnalysisRequest(), ignore_progress)
    inferred = (work / INFERENCE_FILE).rename(tmp_path / "inferred")
    engine.export(archive, inferred, work, AnalysisRequest(), ignore_progress)
    assert reads == []
    with pytest.raises(FileNotFoundError):  # the scan does not stay in memory after the export
        engine.export(archive, inferred, work, AnalysisRequest(), ignore_progress)
    assert reads == ["read"]
