"""A bundle of non-commercial data serves only when it is asked for by name and the operator allows it."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.analysis import AnalysisRequest
from app.api.problems import STATUS_OF_CODE
from app.errors import NonCommercialModel, UnknownModel, WrongSequence
from app.export.nifti import write_nifti
from app.export.outputs import REQUIRED_NAMES
from app.jobs.engine import INFERRED, BundleEngine
from app.main import create_app
from app.manifest import Manifest
from app.runtime.choice import choose, permit
from app.settings import Settings
from app.volume import Source
from tests.api.support import FakeEngine, scan
from tests.support.bundle import tiny_manifest, write_tiny_bundle
from tests.support.phantom import brain


def restricted(name: str = "flair", sequence: str = "FLAIR") -> Manifest:
    tiny = tiny_manifest()
    licence = tiny.licence.model_copy(update={"licence": "CC-BY-NC-SA-4.0", "non_commercial": True})
    return tiny.model_copy(update={"name": name, "sequence": sequence, "licence": licence})


FLAIR_SCAN, NIFTI = Source("dicom", "MR", ("FLAIR",)), Source("nifti")


def test_it_is_never_chosen_for_a_scan() -> None:
    with pytest.raises(WrongSequence) as caught:
        choose([tiny_manifest(), restricted()], FLAIR_SCAN, None)
    assert choose([tiny_manifest(), restricted()], NIFTI, None).manifest.name == "tiny"
    assert "flair" not in caught.value.expected


def test_alone_it_is_not_chosen_either_and_the_answer_says_how_to_have_it() -> None:
    with pytest.raises(UnknownModel, match="0 models fit") as caught:
        choose([restricted()], NIFTI, None)
    assert caught.value.expected == "one of flair-0.0.1 (MR, FLAIR; only when asked for by name)."


def test_asked_for_by_name_it_is_found() -> None:
    choice = choose([tiny_manifest(), restricted()], FLAIR_SCAN, "flair")
    assert (choice.manifest.name, choice.by, choice.doubt) == ("flair", "caller", "")


def test_the_operator_must_allow_it() -> None:
    permit(restricted(), noncommercial=True)
    permit(tiny_manifest(), noncommercial=False)
    with pytest.raises(NonCommercialModel, match=r"CC-BY-NC-SA-4\.0") as caught:
        permit(restricted(), noncommercial=False)
    assert "COUNTERPART_ALLOW_NONCOMMERCIAL" in caught.value.advice
    assert (caught.value.code, STATUS_OF_CODE[caught.value.code]) == ("non_commercial_model", 403)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with the tiny bundle, under a licence that forbids commercial use."""
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


def test_the_engine_refuses_it_before_it_is_loaded(models: Path, tmp_path: Path, head: Path) -> None:
    engine = BundleEngine(models, "cpu", 1)
    engine.warm_up()  # nothing to load, and nothing broken
    with pytest.raises(NonCommercialModel):
        engine.infer(head, tmp_path, AnalysisRequest(model="tiny"), lambda *_: None)


def test_where_it_is_allowed_it_serves_and_says_what_it_is_for(models: Path, tmp_path: Path, head: Path) -> None:
    engine = BundleEngine(models, "cpu", 1, noncommercial=True)
    engine.warm_up()
    engine.infer(head, tmp_path, AnalysisRequest(model="tiny"), lambda *_: None)
    report = engine.export(head, tmp_path / INFERRED, tmp_path, AnalysisRequest(model="tiny"), lambda *_: None)
    assert report.research_use_only is True
    assert report.notice.startswith("Research use only")
    assert {path.name for path in tmp_path.iterdir()} >= set(REQUIRED_NAMES)


# ---- over HTTP ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("allowed", "status"), [(False, 403), (True, 202)])
def test_a_call_that_names_it_is_answered_before_the_upload(tmp_path: Path, status: int, *, allowed: bool) -> None:
    engine = FakeEngine()
    engine.manifests = [restricted(), tiny_manifest()]
    settings = Settings(store=str(tmp_path), allow_noncommercial=allowed, drain_seconds=0)
    with TestClient(create_app(settings, engine)) as client:
        answer = client.post("/v1/scans?model=flair", content=scan(), headers={"content-type": "application/gzip"})
    assert answer.status_code == status
    assert answer.json().get("code") == (None if allowed else "non_commercial_model")
