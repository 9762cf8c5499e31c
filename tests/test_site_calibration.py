"""`counterpart calibrate` and `counterpart drift`: thresholds from healthy scans, openly excluded outliers, drift."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from app import site_calibration
from app.analysis import AnalysisRequest
from app.cli import app
from app.errors import TooFewScans
from app.export.report import Report
from app.pipeline.risk_control import FACTORS, LOSS_LIMIT, conformal_threshold
from app.runtime.bundle import Bundle, load_bundle
from app.site_calibration import calibrate, list_scans, measure_drift, read_reports, score_range
from app.site_profile import SiteProfile, SiteProfiles, write_profile
from tests.support.dicom import Series, make_datasets, save
from tests.support.phantom import brain, grid
from tests.support.results import run_analysis, save_nifti

SCANS = 11


# ---- threshold ---------------------------------------------------------------------------------


def test_the_lowest_threshold_within_the_target_is_chosen() -> None:
    # Ten scans: (sum + 5) / 11 <= 1 holds for a sum of at most 6.
    volumes = np.array([[2.0, 0.7, 0.6, 0.0]] * 10)
    assert conformal_threshold(volumes, 1.0) == 2
    assert conformal_threshold(volumes[:, :2], 1.0) is None


def test_one_large_volume_counts_at_most_five_targets() -> None:
    volumes = np.zeros((10, 1))
    volumes[0] = 1e3
    assert conformal_threshold(volumes, 1.0) == 0
    volumes[1] = 1.1
    assert conformal_threshold(volumes, 1.0) is None


def test_the_expected_volume_of_a_new_scan_is_at_most_the_target() -> None:
    """Exchangeable scans whose volume falls with the threshold: the mean over many sites is the risk."""
    rng = np.random.default_rng(7)
    thresholds, target = np.geomspace(0.01, 100, 200), 1.0
    losses = []
    for _ in range(2000):
        sizes = rng.lognormal(0.5, 1.2, SCANS)
        curves = sizes[:, None] / thresholds
        chosen = conformal_threshold(curves[:-1], target)
        assert chosen is not None
        losses.append(min(curves[-1, chosen], LOSS_LIMIT * target))
    assert np.mean(losses) <= target
    assert np.mean(losses) > 0.6 * target  # not met by being too strict


def test_scores_far_from_the_others_are_outside_the_range() -> None:
    scores = [*np.linspace(0.9, 1.1, 10), 9.0]
    fitting = score_range(scores)
    assert [fitting.low <= score <= fitting.high for score in scores] == [True] * 10 + [False]


# ---- scans -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tiny_models: Path) -> Bundle:
    return load_bundle(tiny_models / "tiny-0.0.1", threads=1)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of healthy scans: phantoms of other sizes with noise of their own."""
    folder = tmp_path_factory.mktemp("healthy")
    for i in range(SCANS):
        volume = brain((52, 64, 48), grid(), scale=0.96 + 0.01 * (i % 5))
        noise = np.random.default_rng(i).normal(0, 12, volume.shape).astype(np.float32)
        save_nifti(
            folder / f"{i:02d}.nii.gz", type(volume)(np.where(volume.array > 0, volume.array + noise, 0), volume.affine)
        )
    (folder / ".hidden.nii.gz").touch()
    (folder / "notes.txt").write_text("no scan")
    return folder


def run(paths: list[Path], bundle: Bundle, target_ml: float = 1.0) -> tuple[SiteProfile, list[str]]:
    outcomes: list[str] = []
    profile = calibrate(
        paths,
        lambda _: bundle,
        [bundle.manifest],
        AnalysisRequest(),
        target_ml,
        lambda _, outcome: outcomes.append(outcome),
    )
    return profile, outcomes


@pytest.fixture(scope="module")
def profile(healthy: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> SiteProfile:
    damaged = tmp_path_factory.mktemp("damaged") / "damaged.nii.gz"
    damaged.write_bytes(b"\x1f\x8b no image")
    with pytest.MonkeyPatch.context() as patch:
        # The brain of the phantom has little contrast, so lesions of the usual contrast are not visible in it.
        patch.setattr(site_calibration, "CONTRASTS", (2.5, -2.5))
        made, outcomes = run([damaged, *list_scans(healthy)], bundle)
    assert outcomes[0] != "ok"
    assert outcomes[1:] == ["ok"] * SCANS
    return made


def test_hidden_and_other_files_are_no_scans(healthy: Path) -> None:
    assert len(list_scans(healthy)) == SCANS


def test_the_profile_states_scans_and_exclusions(profile: SiteProfile, bundle: Bundle) -> None:
    assert profile.scans == SCANS
    assert sum(profile.excluded.values()) == 1
    assert profile.model_sha256 == bundle.sha256
    assert profile.scanner is None


def test_thresholds_keep_their_ratio_and_are_a_candidate(profile: SiteProfile, bundle: Bundle) -> None:
    residual = bundle.manifest.residual
    factor = profile.threshold / residual.threshold
    assert profile.extent_threshold / residual.extent_threshold == pytest.approx(factor, rel=1e-4)
    assert np.abs(FACTORS / factor - 1).min() < 1e-4


def test_the_volumes_of_the_profile_are_those_of_an_analysis(
    profile: SiteProfile, healthy: Path, bundle: Bundle, tmp_path: Path
) -> None:
    loaded = replace(bundle, site_profiles=SiteProfiles(profiles=(profile,)))
    volumes = sorted(run_analysis(path, tmp_path, loaded).lesion_volume_ml for path in list_scans(healthy))
    assert volumes == pytest.approx(profile.volumes_ml, abs=2e-3)
    assert np.minimum(volumes, LOSS_LIMIT * profile.target_ml).mean() <= profile.target_ml


def test_the_price_in_sensitivity_is_stated(profile: SiteProfile, bundle: Bundle) -> None:
    assert sum(row.lesions for row in profile.sensitivity) == SCANS
    assert [row.volume_ml for row in profile.sensitivity] == [2.0, 10.0, 40.0]
    assert profile.threshold < bundle.manifest.residual.threshold  # the scans have no findings, so sensitivity rises
    assert all(row.detected >= row.detected_by_model for row in profile.sensitivity)
    assert profile.sensitivity[-1].detected > 0
    assert all(0 <= row.dice <= 1 for row in profile.sensitivity)


def test_too_few_scans_are_refused(healthy: Path, bundle: Bundle) -> None:
    with pytest.raises(TooFewScans, match="9 scans"):
        run(list_scans(healthy)[:9], bundle)


def test_scans_of_two_scanners_are_refused(healthy: Path, bundle: Bundle, tmp_path: Path) -> None:
    datasets = make_datasets(brain(), Series(modality="MR"))
    for dataset in datasets:
        dataset.ManufacturerModelName, dataset.MagneticFieldStrength = "Model", "2.89"
    (tmp_path / "series").mkdir()
    save(tmp_path / "series", datasets)
    with pytest.raises(TooFewScans, match="2 scanners"):
        run([*list_scans(healthy)[:2], tmp_path / "series"], bundle)


# ---- drift -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(profile: SiteProfile, healthy: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Report:
    loaded = replace(bundle, site_profiles=SiteProfiles(profiles=(profile,)))
    return run_analysis(list_scans(healthy)[0], tmp_path_factory.mktemp("out"), loaded)


def with_score(report: Report, score: float) -> Report:
    return report.model_copy(update={"scores": report.scores.model_copy(update={"scan": score})})


def test_scores_of_the_calibration_have_not_drifted(profile: SiteProfile, report: Report) -> None:
    drift = measure_drift(profile, [with_score(report, score) for score in profile.scan_scores])
    assert not drift.has_drifted
    assert drift.outside == 0


def test_higher_scores_have_drifted(profile: SiteProfile, report: Report) -> None:
    drift = measure_drift(profile, [with_score(report, 1.3 * score) for score in profile.scan_scores])
    assert drift.has_drifted


def test_few_reports_say_nothing(profile: SiteProfile, report: Report) -> None:
    with pytest.raises(TooFewScans):
        measure_drift(profile, [report] * 9)


def test_only_reports_of_the_profile_are_read(profile: SiteProfile, report: Report, tmp_path: Path) -> None:
    for name, content in (("a", report.model_dump_json()), ("b", "{}"), ("c", "no json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(content)
    model = report.model.model_copy(update={"site_profile": None})
    (tmp_path / "report.json").write_text(report.model_copy(update={"model": model}).model_dump_json())
    assert read_reports(tmp_path, profile) == [report]


@pytest.mark.parametrize(("factor", "status", "text"), [(1.0, 0, "no drift found"), (1.3, 1, "drifted")])
def test_the_command_compares_reports_with_a_profile(
    profile: SiteProfile, report: Report, tmp_path: Path, factor: float, status: int, text: str
) -> None:
    write_profile(profile, tmp_path / "profile.json", None)
    for number, score in enumerate(profile.scan_scores):
        folder = tmp_path / "results" / str(number)
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(with_score(report, factor * score).model_dump_json())
    done = CliRunner().invoke(app, ["drift", str(tmp_path / "profile.json"), str(tmp_path / "results")])
    assert (done.exit_code, text in done.output) == (status, True)
