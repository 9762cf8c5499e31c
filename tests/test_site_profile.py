"""Site profiles: signature, selection by scanner, and their effect on an analysis."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from app.analysis import AnalysisRequest, infer
from app.errors import InvalidProfile
from app.jobs.engine import BundleEngine
from app.main import create_app
from app.manifest import Range
from app.runtime.bundle import Bundle, load_bundle
from app.settings import Settings
from app.site_profile import SiteProfile, SiteProfiles, Volumes, load_site_profiles, read_profile, write_profile
from app.volume import Scanner
from tests.api.support import BASE_URL
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, with_lesion
from tests.support.results import run_analysis, save_nifti

KEY, OTHER_KEY = "a key of 16 characters", "another key of 16 characters"
SCANNER = Scanner("SIEMENS", "PRISMA", 3.0)
VOLUMES = Volumes(median=0.5, percentile_90=1.0, mean=0.6, largest=1.2)


def profile_of(scanner: Scanner | None = None, model_sha256: str = "a" * 64, **changes: object) -> SiteProfile:
    return SiteProfile(
        created=datetime(2026, 11, 28, tzinfo=UTC),
        code_version="0.1.0",
        model="tiny-0.0.1",
        model_sha256=model_sha256,
        scanner=scanner,
        scans=12,
        excluded={"score_outlier": 1},
        target_ml=1.0,
        threshold=0.2,
        extent_threshold=0.1,
        before=VOLUMES,
        achieved=VOLUMES,
        sensitivity=(),
        scan_score=Range(low=0.1, high=2.0),
        scan_scores=(0.5, 0.6),
        volumes_ml=(0.5, 0.6),
    ).model_copy(update=changes)


@pytest.mark.parametrize("key", [None, KEY])
def test_a_written_profile_is_read_again(key: str | None, tmp_path: Path) -> None:
    write_profile(profile_of(SCANNER), tmp_path / "p.json", key)
    assert read_profile(tmp_path / "p.json", key) == profile_of(SCANNER)


def test_a_changed_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_profile(profile_of(), path, KEY)
    content = json.loads(path.read_text())
    content["profile"]["threshold"] = 0.05
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidProfile, match="hash"):
        read_profile(path, None)


@pytest.mark.parametrize("signed_with", [None, OTHER_KEY])
def test_a_profile_without_the_signature_of_the_key_is_refused(signed_with: str | None, tmp_path: Path) -> None:
    write_profile(profile_of(), tmp_path / "p.json", signed_with)
    with pytest.raises(InvalidProfile, match="signature"):
        load_site_profiles(tmp_path, SecretStr(KEY), any_scanner=False)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"profile": {}, "sha256": "", "signature": null}', b"\xff\xfe"])
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(InvalidProfile):
        load_site_profiles(tmp_path, None, any_scanner=False)


def test_two_profiles_of_one_scanner_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_profile(profile_of(SCANNER), tmp_path / f"{name}.json", None)
    with pytest.raises(InvalidProfile, match="Two"):
        load_site_profiles(tmp_path, None, any_scanner=False)


def test_a_profile_fits_its_model_and_scanner_only() -> None:
    other = replace(SCANNER, model="SKYRA")
    profiles = SiteProfiles(profiles=(profile_of(SCANNER), profile_of(other), profile_of(SCANNER, "b" * 64)))
    assert profiles.find("a" * 64, other) == profile_of(other)
    assert profiles.find("c" * 64, SCANNER) is None
    assert profiles.find("a" * 64, None) is None


def test_the_only_profile_of_a_model_is_used_for_any_scanner_on_request() -> None:
    one = SiteProfiles(profiles=(profile_of(SCANNER),), any_scanner=True)
    two = SiteProfiles(profiles=(profile_of(SCANNER), profile_of(None)), any_scanner=True)
    assert one.find("a" * 64, replace(SCANNER, field_strength=1.5)) == profile_of(SCANNER)
    assert two.find("a" * 64, replace(SCANNER, field_strength=1.5)) is None


# ---- in an analysis ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tiny_models: Path) -> Bundle:
    return load_bundle(tiny_models / "tiny-0.0.1", threads=1)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nifti(tmp_path_factory.mktemp("scan") / "scan.nii.gz", with_lesion(brain(), LESION_MM, RADIUS_MM))


def test_the_thresholds_of_the_profile_decide(scan: Path, bundle: Bundle, tmp_path: Path) -> None:
    unchanged = run_analysis(scan, tmp_path, bundle)
    profile = profile_of(None, bundle.sha256, threshold=1e3, extent_threshold=1e3, scan_score=Range(low=0, high=1e6))
    report = run_analysis(scan, tmp_path, replace(bundle, site_profiles=SiteProfiles(profiles=(profile,))))
    assert len(unchanged.findings) == 1
    assert unchanged.model.site_profile is None
    assert report.findings == ()
    assert report.threshold == 1e3
    assert report.model.site_profile is not None
    assert report.model.site_profile.id == profile.id
    assert report.warnings == unchanged.warnings


def test_a_scan_outside_the_profile_is_marked(scan: Path, bundle: Bundle, tmp_path: Path) -> None:
    unchanged = run_analysis(scan, tmp_path, bundle)
    profile = profile_of(SCANNER, bundle.sha256, scan_score=Range(low=0, high=1e-6))
    profiles = SiteProfiles(profiles=(profile,), any_scanner=True)
    report = run_analysis(scan, tmp_path, replace(bundle, site_profiles=profiles))
    assert report.model.site_profile is not None
    assert report.model.site_profile.other_scanner
    assert len(report.warnings) == len(unchanged.warnings) + 2


def test_the_model_page_gets_the_profiles_of_its_model(tiny_models: Path, tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    of_tiny, of_other = profile_of(SCANNER), profile_of(SCANNER, "b" * 64, model="other-1.0.0")
    for profile, name in ((of_tiny, "a"), (of_other, "b")):
        write_profile(profile, tmp_path / "profiles" / f"{name}.json", KEY)
    settings = Settings(
        store=str(tmp_path / "store"), models=tiny_models, profiles=tmp_path / "profiles", profile_key=SecretStr(KEY)
    )
    client = TestClient(create_app(settings, worker=False), BASE_URL)
    (found,) = client.get("/v1/models/tiny-0.0.1").json()["site_profiles"]
    assert SiteProfile.model_validate(found) == of_tiny


def test_the_inference_result_has_the_thresholds_of_the_profile(scan: Path, bundle: Bundle, tmp_path: Path) -> None:
    profiles = SiteProfiles(profiles=(profile_of(None, bundle.sha256),))
    loaded = replace(bundle, site_profiles=profiles)
    _, inference = infer(
        scan, tmp_path, lambda _: loaded, [bundle.manifest], AnalysisRequest(), lambda _stage, _fraction: None
    )
    assert (inference.manifest.residual.threshold, inference.manifest.residual.extent_threshold) == (0.2, 0.1)


def test_settings_that_change_results_make_another_job(tiny_models: Path) -> None:
    def key(*profiles: SiteProfile, any_scanner: bool = False, **arguments: Any) -> str:
        loaded = SiteProfiles(profiles=profiles, any_scanner=any_scanner).model_dump(mode="json")
        return BundleEngine(tiny_models, "cpu", 1, site_profiles=loaded, **arguments).settings_key

    keys = [
        key(),
        key(profile_of(SCANNER)),
        key(profile_of(SCANNER), any_scanner=True),
        key(profile_of(SCANNER, threshold=0.3)),
        key(segmentation_type="labelmap"),
    ]
    assert keys[0] == ""
    assert len(set(keys)) == len(keys)
