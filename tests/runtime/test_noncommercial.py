"""Non-commercial bundle: it is used only if the caller names it and the operator allows it."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.analysis import AnalysisRequest
from app.api.problems import STATUS_OF_CODE
from app.errors import NonCommercialModel, UnknownModel, WrongSequence
from app.export.outputs import REQUIRED_NAMES, write_nifti
from app.jobs.engine import INFERENCE_FILE, BundleEngine
from app.main import create_app
from app.manifest import Manifest
from app.runtime.selection import check_licence, select_model
from app.settings import Settings
from app.volume import Source
from tests.api.support import BASE_URL, FakeEngine, fake_scan
from tests.support.bundle import tiny_manifest, write_tiny_bundle
from tests.support.phantom import brain


def restricted(name: str = "flair", sequence: str = "FLAIR") -> Manifest:
    tiny = tiny_manifest()
    licence = tiny.licence.model_copy(update={"licence": "CC-BY-NC-SA-4.0", "non_commercial": True})
    return tiny.model_copy(update={"name": name, "sequence": sequence, "licence": licence})


FLAIR_SCAN, NIFTI = Source("dicom", "MR", ("FLAIR",)), Source("nifti")


def test_restricted_bundle_is_not_selected_for_a_scan() -> None:
    with pytest.raises(WrongSequence) as caught:
        select_model([tiny_manifest(), restricted()], FLAIR_SCAN, None)
    assert select_model([tiny_manifest(), restricted()], NIFTI, None).manifest.name == "tiny"
    assert "flair" not in caught.value.expected


def test_only_bundle_is_not_selected_if_it_is_restricted() -> None:
    with pytest.raises(UnknownModel) as caught:
        select_model([restricted()], NIFTI, None)
    assert "only if named" in caught.value.expected


def test_restricted_bundle_is_selected_by_name() -> None:
    selection = select_model([tiny_manifest(), restricted()], FLAIR_SCAN, "flair")
    assert (selection.manifest.name, selection.by, selection.warning) == ("flair", "caller", "")


def test_operator_must_accept_the_licence() -> None:
    check_licence(restricted(), noncommercial=True)
    check_licence(tiny_manifest(), noncommercial=False)
    with pytest.raises(NonCommercialModel, match=r"CC-BY-NC-SA-4\.0") as caught:
        check_licence(restricted(), noncommercial=False)
    assert "COUNTERPART_ALLOW_NONCOMMERCIAL" in caught.value.advice
    assert (caught.value.code, STATUS_OF_CODE[caught.value.code]) == ("non_commercial_model", 403)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Return a folder with the tiny bundle under a non-commercial licence."""
    folder = write_tiny_bundle(tmp_path / "models")
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"non_commercial": false', '"non_commercial": true'))
    assert manifest.read_text() != text
    return folder.parent


@pytest.fixture
def head(tmp_path: Path) -> Path:
    volume, path = brain(), tmp_path / "head.nii.gz"
    write_nifti(path, volume.array, volume.affine, 1, "phantom")
    return path


def test_engine_refuses_a_restricted_bundle(models: Path, tmp_path: Path, head: Path) -> None:
    engine = BundleEngine(models, "cpu", 1)
    engine.warm_up()
    with pytest.raises(NonCommercialModel):
        engine.infer(head, tmp_path, AnalysisRequest(model="tiny"), lambda *_: None)


def test_allowed_bundle_is_used_and_its_report_states_the_restriction(models: Path, tmp_path: Path, head: Path) -> None:
    engine = BundleEngine(models, "cpu", 1, noncommercial=True)
    engine.warm_up()
    engine.infer(head, tmp_path, AnalysisRequest(model="tiny"), lambda *_: None)
    report = engine.export(head, tmp_path / INFERENCE_FILE, tmp_path, AnalysisRequest(model="tiny"), lambda *_: None)
    assert report.research_use_only is True
    assert report.notice.startswith("Research use only")
    assert {path.name for path in tmp_path.iterdir()} >= set(REQUIRED_NAMES)


# ---- over HTTP ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("allowed", "status"), [(False, 403), (True, 202)])
def test_request_for_a_restricted_bundle_is_refused_at_once(tmp_path: Path, status: int, *, allowed: bool) -> None:
    engine = FakeEngine()
    engine.manifests = [restricted(), tiny_manifest()]
    settings = Settings(store=str(tmp_path), allow_noncommercial=allowed, drain_seconds=0)
    with TestClient(create_app(settings, engine), BASE_URL) as client:
        answer = client.post("/v1/scans?model=flair", content=fake_scan(), headers={"content-type": "application/gzip"})
    assert answer.status_code == status
    assert answer.json().get("code") == (None if allowed else "non_commercial_model")
