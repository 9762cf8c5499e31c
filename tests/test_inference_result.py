"""What lies between inference and export: the results are the same from memory and from the file."""

import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from app.export.outputs import DICOM_NAMES
from app.analysis import AnalysisRequest, export, infer
from app.errors import NoBrainMask
from app.inference_result import ExtractedBrain, load_inference_result
from app.inference_result import save_inference_result as save_inferred
from app.ingest import read
from app.pipeline.models import Models
from app.runtime.bundle import Bundle, load_bundle
from tests.support.dicom import SECRET, Series, write_series, zipped
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, grid, head, with_lesion
from tests.test_analysis import ROOMY, SHAPE, quiet, save, with_extractor


@pytest.fixture(scope="module")
def bundle(tiny_models: Path) -> Bundle:
    return load_bundle(tiny_models / "tiny-0.0.1", threads=1)


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report holds the seconds of each stage: the one thing that two runs do not share."""
    monkeypatch.setattr("app.analysis.time", SimpleNamespace(perf_counter=lambda: 0.0))


def both(path: Path, folder: Path, bundle: Bundle) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Results from memory, and from the file and the scan read again."""
    here, there, first, second = (folder / name for name in ("here", "there", "first", "second"))
    for new in (here, there, first, second):
        new.mkdir()
    scan, inferred = infer(path, first, lambda _: bundle, [bundle.manifest], AnalysisRequest(seed=3), quiet)
    save_inferred(inferred, folder / "inferred")
    save_inferred(inferred, folder / "again")
    assert (folder / "inferred").read_bytes() == (folder / "again").read_bytes()
    loaded = load_inference_result(folder / "inferred")
    assert loaded.manifest == inferred.manifest
    assert type(loaded.brain) is type(inferred.brain)
    reports = export(scan, inferred, here, quiet), export(read(path, scratch=second), loaded, there, quiet)
    assert reports[0] == reports[1]
    written, again = ({p.name: p.read_bytes() for p in out.iterdir()} for out in (here, there))
    return written, again


def test_a_head_has_the_same_bytes_from_the_file(bundle: Bundle, small_cubes: None, tmp_path: Path) -> None:  # noqa: ARG001
    path = save(tmp_path / "head.nii.gz", with_lesion(head(ROOMY, grid(ROOMY)), LESION_MM, RADIUS_MM))
    written, again = both(path, tmp_path, with_extractor(bundle))
    assert len(written) == 6
    assert "brain.nii.gz" in written
    assert written == again
    taken = load_inference_result(tmp_path / "inferred").brain
    assert isinstance(taken, ExtractedBrain)
    assert taken.mask.shape == ROOMY


def test_a_dicom_series_has_the_same_bytes_from_the_file(bundle: Bundle, tmp_path: Path) -> None:
    volume = with_lesion(brain(SHAPE, grid(SHAPE)), LESION_MM, RADIUS_MM)
    files = write_series(tmp_path / "series", volume, Series(plane="coronal"))
    written, again = both(zipped(tmp_path / "series.zip", files), tmp_path, bundle)
    assert set(DICOM_NAMES) < set(written)
    assert written == again
    assert SECRET.encode() not in (tmp_path / "inferred").read_bytes()
    assert isinstance(load_inference_result(tmp_path / "inferred").brain, NoBrainMask)


def test_the_export_asks_no_network(bundle: Bundle, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", with_lesion(brain(SHAPE, grid(SHAPE)), LESION_MM, RADIUS_MM))
    asked: list[str] = []

    def counted(name: str):  # type: ignore[no-untyped-def]
        def call(*arrays):  # type: ignore[no-untyped-def]
            asked.append(name)
            return getattr(bundle.models, name)(*arrays)

        return call

    models = Models(counted("encode"), counted("denoise"), counted("decode"))
    own = replace(bundle, models=models)
    scan, inferred = infer(path, tmp_path, lambda _: own, [bundle.manifest], AnalysisRequest(), quiet)
    evaluations = len(asked)
    assert evaluations > 6
    assert set(asked) == {"encode", "denoise", "decode"}
    save_inferred(inferred, tmp_path / "inferred")
    export(scan, load_inference_result(tmp_path / "inferred"), tmp_path, quiet)
    assert len(asked) == evaluations


def test_a_file_that_was_damaged_is_not_taken(bundle: Bundle, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", brain(SHAPE, grid(SHAPE)))
    _, inferred = infer(path, tmp_path, lambda _: bundle, [bundle.manifest], AnalysisRequest(), quiet)
    file = tmp_path / "inferred"
    save_inferred(inferred, file)
    content = bytearray(file.read_bytes())
    at = content.find(np.ascontiguousarray(inferred.detection.anomaly).tobytes())
    assert at > 0
    content[at + 64] ^= 1
    file.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile):
        load_inference_result(file)
