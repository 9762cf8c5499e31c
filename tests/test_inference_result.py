"""The export gives the same bytes from an inference result in memory and from one in a file."""

import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from app.analysis import AnalysisRequest, export, infer
from app.errors import NoBrainMask
from app.export.outputs import BRAIN_NAME, DICOM_NAMES
from app.inference_result import ExtractedBrain, load_inference_result, save_inference_result
from app.ingest.reader import read_scan
from app.pipeline.diffusion import Networks
from app.runtime.bundle import Bundle, load_bundle
from tests.support.dicom import SECRET, Series, write_series, zip_files
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, grid, head, with_lesion
from tests.support.results import check_progress, save_nifti, with_extractor

HEAD_SHAPE = (76, 88, 80)


@pytest.fixture(scope="module")
def bundle(tiny_models: Path) -> Bundle:
    return load_bundle(tiny_models / "tiny-0.0.1", threads=1)


@pytest.fixture(autouse=True)
def _stop_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report contains the seconds of each stage, which differ between two runs."""
    monkeypatch.setattr("app.analysis.time", SimpleNamespace(perf_counter=lambda: 0.0))


def export_twice(path: Path, folder: Path, bundle: Bundle) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Export from memory, and from the file with the scan read again."""
    first, second, scratch, scratch_again = (folder / name for name in ("first", "second", "scratch", "scratch_again"))
    for new in (first, second, scratch, scratch_again):
        new.mkdir()
    request = AnalysisRequest(seed=3)
    scan, inference = infer(path, scratch, lambda _: bundle, [bundle.manifest], request, check_progress)
    save_inference_result(inference, folder / "inference")
    save_inference_result(inference, folder / "inference_again")
    assert (folder / "inference").read_bytes() == (folder / "inference_again").read_bytes()
    loaded = load_inference_result(folder / "inference")
    assert loaded.manifest == inference.manifest
    assert type(loaded.brain) is type(inference.brain)
    report = export(scan, inference, first, check_progress)
    assert report == export(read_scan(path, scratch=scratch_again), loaded, second, check_progress)
    contents, contents_again = ({p.name: p.read_bytes() for p in out.iterdir()} for out in (first, second))
    return contents, contents_again


def test_head_has_the_same_bytes_from_a_file(bundle: Bundle, small_cubes: None, tmp_path: Path) -> None:  # noqa: ARG001
    volume = with_lesion(head(HEAD_SHAPE, grid(HEAD_SHAPE)), LESION_MM, RADIUS_MM)
    path = save_nifti(tmp_path / "head.nii.gz", volume)
    contents, contents_again = export_twice(path, tmp_path, with_extractor(bundle))
    assert BRAIN_NAME in contents
    assert contents == contents_again
    extracted = load_inference_result(tmp_path / "inference").brain
    assert isinstance(extracted, ExtractedBrain)
    assert extracted.mask.shape == HEAD_SHAPE


def test_dicom_series_has_the_same_bytes_from_a_file(bundle: Bundle, tmp_path: Path) -> None:
    files = write_series(tmp_path / "series", with_lesion(brain(), LESION_MM, RADIUS_MM), Series(plane="coronal"))
    contents, contents_again = export_twice(zip_files(tmp_path / "series.zip", files), tmp_path, bundle)
    assert set(DICOM_NAMES) < set(contents)
    assert contents == contents_again
    assert SECRET.encode() not in (tmp_path / "inference").read_bytes()
    assert isinstance(load_inference_result(tmp_path / "inference").brain, NoBrainMask)


def test_export_runs_no_network(bundle: Bundle, tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "scan.nii.gz", with_lesion(brain(), LESION_MM, RADIUS_MM))
    calls: list[str] = []

    def counted(name: str):  # type: ignore[no-untyped-def]
        def call(*arrays):  # type: ignore[no-untyped-def]
            calls.append(name)
            return getattr(bundle.networks, name)(*arrays)

        return call

    counting = replace(bundle, networks=Networks(counted("encode"), counted("denoise"), counted("decode")))
    scan, inference = infer(path, tmp_path, lambda _: counting, [bundle.manifest], AnalysisRequest(), check_progress)
    count = len(calls)
    assert count > 6
    assert set(calls) == {"encode", "denoise", "decode"}
    save_inference_result(inference, tmp_path / "inference")
    export(scan, load_inference_result(tmp_path / "inference"), tmp_path, check_progress)
    assert len(calls) == count


def test_damaged_file_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "scan.nii.gz", brain())
    _, inference = infer(path, tmp_path, lambda _: bundle, [bundle.manifest], AnalysisRequest(), check_progress)
    file = tmp_path / "inference"
    save_inference_result(inference, file)
    content = bytearray(file.read_bytes())
    start = content.find(np.ascontiguousarray(inference.detection.anomaly).tobytes())
    assert start > 0
    content[start + 64] ^= 1
    file.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile):
        load_inference_result(file)
