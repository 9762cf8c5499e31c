"""Comparison of methods: views of baselines, time of networks, thresholds, scores, and the page."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("torch")

from app.manifest import Manifest, Residual, View
from app.pipeline.diffusion import Networks
from app.pipeline.methods import METHODS
from app.runtime.bundle import read_manifest
from app.volume import FloatArray, Volume
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, positions
from training.calibrate import separate_slices
from training.config import ROOT, Config
from training.data import load_split
from training.experiments import baselines, cases, method_comparison, method_comparison_page
from training.experiments.cases import Case, make_case
from training.experiments.comparison_scans import Scans, gaps_of, simulated_case
from training.experiments.manifests import changed
from training.experiments.method_comparison import (
    Candidate,
    NetworkClock,
    autoencoder_budget,
    empty_document,
    in_views,
    measure,
    measure_times,
    times_intensity,
    view_case,
)
from training.experiments.method_comparison_page import (
    HOME,
    OTHER_SCANNERS,
    Comparison,
    LesionScores,
    MethodResult,
    mean_gain,
    mean_score,
    page,
)
from training.experiments.segmentation import FILTERS, ComparedMethod, counterpart_map

pytestmark = pytest.mark.training

REAL = "MS lesions, T1"
VIEWS = (View(), View(mirrored=True, shift=(1, 1)), View(shift=(1, 1)))


@pytest.fixture(scope="module")
def manifest(tiny_models: Path) -> Manifest:
    return read_manifest(next(path.parent for path in tiny_models.glob("tiny-*/manifest.json")))


@pytest.fixture(scope="module")
def config(manifest: Manifest) -> Config:
    loaded = Config.load(ROOT / "training" / "configs" / "t1.toml")
    return loaded.model_copy(update={"preprocessing": manifest.preprocessing})


def make(manifest: Manifest, subject: str, kind: str) -> Case:
    """Make a case from the phantom, with a bright ball unless it is healthy."""
    volume = brain()
    ball = np.linalg.norm(positions(volume.shape, volume.affine) - LESION_MM, axis=-1) < RADIUS_MM
    truth = ball & (volume.array > 0) & (kind != "healthy")
    return make_case(subject, kind, Volume(volume.array * np.where(truth, 1.5, 1), volume.affine), truth, manifest)


# ---- methods -----------------------------------------------------------------------------------


def test_map_in_views_is_in_the_place_of_the_identity_view(manifest: Manifest) -> None:
    case = make(manifest, "a", "grade 3")
    np.testing.assert_allclose(in_views(lambda c: c.x[:, 0], VIEWS)(case), case.x[:, 0], atol=1e-6)


def test_map_in_views_is_the_mean_over_views(manifest: Manifest) -> None:
    """A map that depends on the column has a mean over a slice and its mirror image that does not."""
    case = make(manifest, "a", "healthy")
    columns = np.broadcast_to(np.arange(case.x.shape[-1], dtype=np.float32), case.x[:, 0].shape)
    mean = in_views(lambda _: columns, (View(), View(mirrored=True)))(case)
    np.testing.assert_allclose(mean, (case.x.shape[-1] - 1) / 2)


def test_weighted_map_is_the_product_with_the_slice(manifest: Manifest) -> None:
    case = make(manifest, "a", "healthy")
    np.testing.assert_array_equal(times_intensity(lambda c: c.x[:, 0])(case), case.x[:, 0] ** 2)


def test_view_of_a_case_keeps_its_truth(manifest: Manifest) -> None:
    case = make(manifest, "a", "grade 3")
    mirrored = view_case(case, View(mirrored=True))
    np.testing.assert_array_equal(mirrored.x, case.x[..., ::-1])
    np.testing.assert_array_equal(mirrored.foreground, case.foreground[..., ::-1])
    assert mirrored.truth is case.truth


def test_clock_counts_the_slices_of_the_denoiser_and_the_time_of_all_networks() -> None:
    clock = NetworkClock()
    networks = clock.timed_networks(Networks(lambda x: x, lambda z_t, _: z_t, lambda z: z))
    x: FloatArray = np.ones((3, 1, 4, 4), np.float32)
    networks.denoise(x, np.full(3, 5, np.int64))
    after_one = clock.seconds
    networks.encode(x)
    networks.decode(x)
    assert clock.evaluations == 3
    assert 0 < after_one < clock.seconds


def test_map_of_a_bundle_can_be_filtered(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter would spread the NaN of pixels that were not analysed into the lesions."""
    case = make(manifest, "a", "grade 3")
    anomaly = np.ones((max(case.slice_indices) + 1, *case.truth.shape[1:]), np.float32)
    anomaly[:, :10] = np.nan
    monkeypatch.setitem(cast("Any", METHODS), manifest.method, lambda *_: SimpleNamespace(anomaly=anomaly))
    networks = Networks(lambda x: x, lambda z_t, _: z_t, lambda z: z)
    values = counterpart_map(networks, manifest)(case)
    assert np.unique(values).tolist() == [0, 1]
    assert np.isfinite(FILTERS["Gaussian of 2"](values)).all()


def test_the_papers_method_can_be_divided_by_the_local_contrast(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(manifest, "a", "grade 3")
    floors: list[float] = []

    def method(_: Volume, __: Networks, settings: Manifest) -> SimpleNamespace:
        floors.append(settings.residual.contrast_floor)
        return SimpleNamespace(anomaly=np.ones((max(case.slice_indices) + 1, 2, 2), np.float32))

    monkeypatch.setitem(cast("Any", METHODS), manifest.method, method)
    maps = method_comparison.with_local_contrast(Networks(lambda x: x, lambda z, _: z, lambda z: z), manifest)
    for compute in maps.values():
        compute(case)
    assert list(maps) == [baselines.DIFFERENCE, baselines.OVER_CONTRAST]
    assert floors == [manifest.residual.contrast_floor, baselines.CONTRAST_FLOOR]


# ---- measurement -------------------------------------------------------------------------------


def fake_scans(manifest: Manifest) -> Scans:
    """Return scans of the phantom in place of real ones."""
    healthy = [make(manifest, name, "healthy") for name in ("a", "b")]
    lesions = [make(manifest, name, kind) for kind in ("grade 2", REAL) for name in ("a", "b")]
    scans = SimpleNamespace(
        choices=[make(manifest, "c", "grade 2")],
        calibration=healthy,
        simulated=healthy,
        healthy={HOME: healthy, OTHER_SCANNERS: healthy[:1]},
        lesions=lesions,
        shape_of=lambda case: f"shape {case.subject}",
    )
    return cast("Scans", scans)


def test_a_perfect_map_has_perfect_scores_and_no_false_findings(manifest: Manifest, config: Config) -> None:
    clock = NetworkClock()
    oracle = clock.timed(lambda truth: truth.astype(np.float32), counted=True)
    maps = {"wrong": lambda c: 1 - oracle(c.truth), "right": lambda c: oracle(c.truth)}
    candidate = Candidate(ComparedMethod("m", maps, parameters=7), clock)
    result = measure("a method", candidate, fake_scans(manifest), config, manifest)
    assert (result.variant, result.parameters, result.evaluations_per_slice) == ("right", 7, 1)
    assert [score.kind for score in result.lesions] == ["grade 2", "grade 2", REAL, REAL]
    assert {score.auprc for score in result.lesions} == {1.0}
    assert {score.dice for score in result.lesions} == {1.0}
    assert result.found_ml == {HOME: {"a": 0.0, "b": 0.0}, OTHER_SCANNERS: {"a": 0.0}}
    assert result.ms_per_slice > 0


def test_threshold_allows_the_volume_in_the_calibration_scans(manifest: Manifest, config: Config) -> None:
    """The intensity of a healthy head has nothing to find. Its highest values fill the allowed volume."""
    candidate = Candidate(ComparedMethod("m", {"bright": lambda c: c.x[:, 0]}, ("as it is",)))
    result = measure("a method", candidate, fake_scans(manifest), config, manifest)
    assert result.extent_threshold == result.threshold, "any larger extent contains the whole brain"
    assert result.threshold > 0
    assert max(result.found_ml[HOME].values()) <= config.detection.simulated_false_positive_ml


def test_simulated_scanner_keeps_the_place_of_the_head(manifest: Manifest, config: Config) -> None:
    case = make(manifest, "a", "healthy")
    simulated = simulated_case(case, 0, config, manifest)
    assert simulated.x.shape[1:] == case.x.shape[1:]
    assert len(simulated.x) == pytest.approx(len(case.x), abs=2)
    middle = [stack.slice_indices[len(stack.x) // 2] for stack in (case, simulated)]
    before, after = case.slices.x[middle[0], 0] > 0, simulated.slices.x[middle[1], 0] > 0
    assert (before & after).sum() > 0.95 * (before | after).sum()
    assert np.abs(simulated.slices.x[middle[1], 0] - case.slices.x[middle[0], 0])[before & after].mean() > 0.01


def test_shape_of_a_test_scan_is_the_inserted_one(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The intervals resample shapes, so that each scan needs the name of its shape."""
    inserted: list[str] = []
    monkeypatch.setattr(cases, "load_scan", lambda *_: SimpleNamespace(volume=None))
    monkeypatch.setattr(cases, "load_lesion_shape", inserted.append)
    monkeypatch.setattr(cases, "insert_lesion", lambda *_: None)
    insert, subjects = cases.shape_inserter(config, "test"), load_split(config.data.splits).test
    for number, subject in enumerate(subjects):  # as `cases.synthetic` numbers them
        insert(subject, 0.35, number)
    scans = Scans(config, cast("Any", None))
    shapes = [scans.shape_of(cast("Case", SimpleNamespace(kind="grade 2", subject=s))) for s in subjects]
    assert shapes == inserted
    assert scans.shape_of(cast("Case", SimpleNamespace(kind=REAL, subject="patient"))) == "patient"


def test_image_archive_has_no_simulated_scanners_and_resamples_only_subjects() -> None:
    flair = Config.load(ROOT / "training" / "configs" / "flair.toml")
    scans = Scans(flair, cast("Any", None))
    assert scans.simulated == []
    assert scans.shape_of(cast("Case", SimpleNamespace(kind="grade 2", subject="patient"))) == "patient"


def test_choices_are_bright_if_lesions_are_bright(monkeypatch: pytest.MonkeyPatch) -> None:
    contrasts: list[float] = []
    flair = Config.load(ROOT / "training" / "configs" / "flair.toml")

    def insert(_: str, contrast: float, __: int) -> SimpleNamespace:
        contrasts.append(contrast)
        return SimpleNamespace(volume=None, truth=None)

    monkeypatch.setattr(cases, "ellipse_inserter", lambda _: insert)
    monkeypatch.setattr(cases, "load_scan", lambda *_: SimpleNamespace(healthy_slices=None))
    monkeypatch.setattr(cases, "make_case", lambda *_: SimpleNamespace(kind="grade 2", slice_indices=[0]))
    bundle = SimpleNamespace(manifest=None)
    assert len(Scans(flair, cast("Any", bundle)).choices) == cases.VALIDATION_CASES
    assert min(contrasts) > 0


def test_findings_do_not_join_across_a_gap() -> None:
    """The slices on both sides of a tumour are healthy, but not neighbours."""
    case = cast("Case", SimpleNamespace(slice_indices=np.array([3, 4, 7, 8, 10])))
    separated = separate_slices(np.ones((5, 2, 2), np.float32), gaps_of(case))
    assert np.isnan(separated[:, 0, 0]).tolist() == [False, False, True, False, False, True, False]


@pytest.mark.parametrize(("ordered", "gaps"), [(False, True), (True, False)])
def test_images_without_order_count_alone_in_the_calibration(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, *, ordered: bool, gaps: bool
) -> None:
    flair = Config.load(ROOT / "training" / "configs" / "flair.toml")
    assert flair.data.image_archive is not None
    archive = flair.data.image_archive.model_copy(update={"ordered": ordered})
    config = flair.model_copy(update={"data": flair.data.model_copy(update={"image_archive": archive})})
    seen: list[FloatArray] = []

    def settings(maps: list[FloatArray], *_: object) -> Residual:
        seen.extend(maps)
        return manifest.residual

    monkeypatch.setattr(method_comparison, "residual_settings", settings)
    candidate = Candidate(ComparedMethod("m", {"bright": lambda c: c.x[:, 0]}, ("as it is",)))
    scans = fake_scans(manifest)
    measure("a method", candidate, scans, config, manifest)
    slices = len(scans.calibration[0].slice_indices)
    assert len(seen[0]) == (2 * slices - 1 if gaps else slices)


@pytest.mark.parametrize(("name", "simulated"), [("t1", 0.5), ("flair", None), ("headct", None)])
def test_document_names_the_limit_of_simulated_scanners_only_if_there_is_one(
    name: str, simulated: float | None
) -> None:
    config = Config.load(ROOT / "training" / "configs" / f"{name}.toml")
    bundle = cast("Any", SimpleNamespace(manifest=SimpleNamespace(id=f"{name}-1.0.0"), sha256="0" * 64))
    document = empty_document(config, bundle, bundle, 12, 10)
    assert document.simulated_ml == simulated
    assert page(document).startswith(f"# {name}-1.0.0 compared")


def test_each_bundle_with_texts_has_a_budget_of_as_many_slices_as_its_denoiser() -> None:
    """6,000, 1,000 and 10,500 steps of 16, 128 and 16 slices, see decisions 29 and 5."""
    budgets = {name: autoencoder_budget("vae", name) for name in method_comparison_page.TEXTS}
    slices = {name: budget.steps * budget.batch for name, budget in budgets.items()}
    assert slices == {"t1": 6000 * 16, "headct": 1000 * 128, "flair": 10_500 * 16}


def test_times_of_all_methods_come_from_one_run(manifest: Manifest) -> None:
    def network(x: FloatArray) -> FloatArray:
        time.sleep(0.01)
        return x

    def candidate() -> Candidate:
        clock = NetworkClock()
        timed = clock.timed(network)
        return Candidate(ComparedMethod("m", {"difference": lambda case: timed(case.x[:, 0])}), clock)

    stored, scans = document(own=result(0.75), other=result(0.5)), fake_scans(manifest)
    measured = measure_times(stored, {"own": candidate, "other": candidate}, scans)
    assert list(measured.methods) == ["own", "other"]
    for name, timed in measured.methods.items():
        assert 10 <= timed.ms_per_slice * len(scans.lesions[0].slice_indices) < 5000
        assert changed(timed, ms_per_slice=12.34) == stored.methods[name], "nothing else changes"


# ---- page --------------------------------------------------------------------------------------


def result(auprc: float) -> MethodResult:
    kinds = {"grade 2": 6, "grade 3": 6, REAL: 2}
    scores = [
        LesionScores(kind=kind, subject=f"s{i}", shape=f"p{i % 3}", auprc=auprc, best_dice=0.5, dice=0.25)
        for kind, scans in kinds.items()
        for i in range(scans)
    ]
    return MethodResult(
        variant="difference",
        smoothing="as it is",
        threshold=0.1,
        extent_threshold=0.06,
        parameters=4_500_000,
        evaluations_per_slice=8.4,
        ms_per_slice=12.34,
        found_ml={HOME: {"a": 1.0, "b": 1.0}, OTHER_SCANNERS: {"c": 3.0, "d": 3.0}},
        lesions=tuple(scores),
        code="abc",
    )


def document(bundle: str = "t1-1.0.0", **methods: MethodResult) -> Comparison:
    return Comparison(
        bundle=bundle,
        bundle_sha256="0" * 64,
        paper_bundle="t1-pinaya2022-1.0.0",
        paper_sha256="1" * 64,
        calibration_scans=10,
        choice_scans=12,
        false_positive_ml=1.0,
        simulated_ml=0.5,
        autoencoder_budget="5 x 2 slices",
        denoising_autoencoder_budget="7 x 2 slices",
        methods=methods,
    )


def test_page_has_one_row_for_each_method_in_each_table() -> None:
    text = page(document(own=result(0.75), other=result(0.5)))
    assert "| own | 0.75 [0.75, 0.75] | 0.50 [0.50, 0.50] | 0.25 [0.25, 0.25] |" in text
    assert "| 0.25 [0.25, 0.25] | 0.75 | 0.50 | 0.25 |" in text, "two patients have no interval"
    assert "| other | 1.00 [1.00, 1.00] | 1.0 | 3.00 [3.00, 3.00] | 3.0 | 8.4 | 12.3 | 4.5 |" in text
    assert "| other | +0.25 [+0.25, +0.25] | +0.00 [+0.00, +0.00] |" in text
    assert "| own | +0" not in text, "the reference has no difference to itself"
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert [len({line.count("|") for line in table.splitlines()}) for table in tables] == [1, 1, 1]


def test_page_without_results_has_only_the_introduction() -> None:
    assert "| method" not in page(document())


def test_page_states_that_the_autoencoders_are_not_measured_yet() -> None:
    text = "They are not measured yet."
    assert text in page(document(own=result(0.75)))
    measured = {"own": result(0.75), "variational autoencoder, 4 views": result(0.5)}
    assert text not in page(document().model_copy(update={"methods": measured}))


@pytest.mark.parametrize("bundle", ["flair-1.0.0", "headct-1.0.0"])
def test_page_of_a_bundle_without_other_scanners(bundle: str) -> None:
    """No simulated scanner determines its threshold, and it has no column for other scanners."""
    own = result(0.75).model_copy(update={"found_ml": {HOME: {"a": 1.0, "b": 1.0}}})
    text = page(document(bundle, own=own).model_copy(update={"simulated_ml": None}))
    assert "other scanners, ml" not in text
    assert "simulated" not in text
    assert "| own | 1.00 [1.00, 1.00] | 1.0 | 8.4 | 12.3 | 4.5 |" in text


def test_interval_of_lesions_of_one_subject_each_resamples_subjects_once() -> None:
    """Squared counts of a two-way bootstrap would make the interval of real lesions too wide."""
    scores = [
        LesionScores(kind="tumours", subject=f"s{i}", shape=f"s{i}", auprc=i / 9, best_dice=0.5, dice=0.25)
        for i in range(10)
    ]
    crossed = [score.model_copy(update={"shape": f"p{i}"}) for i, score in enumerate(scores)]
    once, twice = mean_score(scores, "auprc"), mean_score(crossed, "auprc")
    assert once.value == twice.value
    assert once.high - once.low < twice.high - twice.low


def test_paired_differences_need_the_same_scans() -> None:
    first, second = result(0.75).lesions, result(0.5).lesions
    assert mean_gain(first, second, "auprc").value == pytest.approx(0.25)
    with pytest.raises(AssertionError, match="the same scans"):
        mean_gain(first, second[::-1], "auprc")


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "evaluation").glob("*-methods.json")), ids=lambda p: p.stem)
def test_stored_page_belongs_to_the_stored_results(path: Path) -> None:
    assert path.with_suffix(".md").read_text() == page(Comparison.model_validate_json(path.read_text()))
