"""Analysis of one scan, from the file to the results."""

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from app.analysis import AnalysisRequest
from app.errors import BrainNotExtracted, Cancelled, NotAnImageFormat, UnknownModel, WrongFieldOfView, WrongModality
from app.export.outputs import BRAIN_NAME, DICOM_NAMES, REQUIRED_NAMES
from app.export.report import Report
from app.pipeline.brain_extraction import ExtractionNetworks
from app.pipeline.findings import dice
from app.runtime.bundle import Bundle, load_bundle
from app.volume import Volume
from tests.support.dicom import RAS_TO_LPS, SECRET, Plane, Series, write_series, zip_files
from tests.support.grids import tilted
from tests.support.heads import nothing
from tests.support.phantom import LESION_MM, RADIUS_MM, ball, brain, grid, head, with_lesion
from tests.support.results import run_analysis, save_nifti, with_extractor
from tests.support.segmentation import segment_points

# Oblique, along left and posterior, and rounded to float32 as in a NIfTI header.
SHAPE = (58, 70, 52)
MIRROR = np.array([[-1, 0, 0, 57], [0, -1, 0, 69], [0, 0, 1, 0], [0, 0, 0, 1]])
AFFINE = (tilted(grid(SHAPE), 6, -9, 14) @ MIRROR).astype("f4").astype(np.float64)
HEAD_SHAPE = (76, 88, 80)
SAME_BYTES = [name for name in REQUIRED_NAMES if name != "report.json"]

Results = tuple[Path, Report]


@pytest.fixture(scope="module")
def bundle(tiny_models: Path) -> Bundle:
    return load_bundle(tiny_models / "tiny-0.0.1", threads=1)


@pytest.fixture(scope="module")
def volume() -> Volume:
    return with_lesion(brain(SHAPE, AFFINE), LESION_MM, RADIUS_MM)


@pytest.fixture(scope="module")
def scan(volume: Volume, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_nifti(tmp_path_factory.mktemp("scan") / "scan.nii.gz", volume)


@pytest.fixture(scope="module")
def results(scan: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("out")
    return out, run_analysis(scan, out, bundle)


def load(out: Path, name: str) -> tuple[nib.Nifti1Image, np.ndarray]:
    image = nib.load(out / f"{name}.nii.gz")
    assert isinstance(image, nib.Nifti1Image)
    return image, np.asarray(image.dataobj)


# ---- result files ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("mask", np.uint8), ("anomaly", np.float32), ("counterpart", np.float32)])
def test_results_have_the_grid_of_the_scan(scan: Path, results: Results, name: str, dtype: type[np.generic]) -> None:
    image, array = load(results[0], name)
    source = nib.load(scan)
    assert isinstance(source, nib.Nifti1Image)
    assert image.shape == SHAPE
    assert array.dtype == dtype
    sform, code = image.get_sform(coded=True)
    np.testing.assert_array_equal(sform, source.get_sform())
    assert code == 1
    qform, qcode = image.get_qform(coded=True)
    np.testing.assert_allclose(qform, sform, atol=1e-3)
    assert qcode == 1
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header["scl_slope"] == 1 or np.isnan(image.header["scl_slope"])


def test_lesion_is_in_the_mask_at_its_position(volume: Volume, results: Results) -> None:
    image, mask = load(results[0], "mask")
    assert np.unique(mask).tolist() == [0, 1]
    # One latent is 12 mm wide and the lesion 30 mm, so a high Dice is impossible.
    assert dice(ball(volume, LESION_MM, RADIUS_MM), mask == 1) > 0.65
    centroid = nib.affines.apply_affine(image.affine, np.argwhere(mask)).mean(axis=0)
    assert centroid == pytest.approx(LESION_MM, abs=3.0)


def test_maps_agree_with_the_mask_and_the_scan(scan: Path, results: Results) -> None:
    (_, mask), (_, anomaly), (_, counterpart) = (load(results[0], name) for name in ("mask", "anomaly", "counterpart"))
    source = np.asarray(nib.load(scan).dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    assert (anomaly[mask == 1] > results[1].extent_threshold).all()
    assert np.isnan(anomaly[source == 0]).mean() > 0.95
    np.testing.assert_array_equal(counterpart[(source == 0) & np.isnan(anomaly)], 0)
    assert (counterpart == source)[np.isnan(anomaly) | (anomaly == 0)].mean() > 0.98
    assert np.abs(counterpart - source)[mask == 1].mean() > 100  # of about 800


def test_report_agrees_with_the_files(results: Results) -> None:
    out, report = results
    _, mask = load(out, "mask")
    _, anomaly = load(out, "anomaly")
    assert report.lesion_volume_ml == pytest.approx(mask.sum() * 0.027, abs=0.001)
    assert sum(f.volume_ml for f in report.findings) == pytest.approx(report.lesion_volume_ml, abs=0.002)
    assert report.findings[0].centroid_mm == pytest.approx(LESION_MM, abs=3.0)
    assert report.findings[0].peak_score == pytest.approx(np.nanmax(anomaly[mask == 1]), abs=1e-4)
    assert report.analysed.volume_ml == pytest.approx(np.isfinite(anomaly).sum() * 0.027, abs=0.1)
    assert report.input.shape == SHAPE
    assert report.input.spacing_mm == pytest.approx((3, 3, 3), abs=1e-4)
    assert report.scores.outlier_fraction == 0
    analysed = report.analysed.slices - len(report.analysed.slices_not_analysed)
    assert report.work.network_evaluations == 3 * analysed + 5 * report.work.slices_reversed + 8
    assert 0 < report.work.slices_reversed < analysed
    assert sum(s is None for s in report.scores.slices) == len(report.analysed.slices_not_analysed)
    by_slice = [s for s in report.scores.slices if s is not None]
    assert min(by_slice) < report.scores.scan < max(by_slice)
    assert set(report.work.seconds) == {"read", "load", "extract", "infer", "export"}


def test_report_contains_provenance(bundle: Bundle, results: Results) -> None:
    document = json.loads((results[0] / "report.json").read_text())
    assert document["research_use_only"] is True
    assert "Not a medical device" in document["notice"]
    selection = document["model"].pop("selection")
    assert document["model"] == {
        "id": "tiny-0.0.1",
        "sha256": bundle.sha256,
        "provider": "cpu",
        "precision": "float32",
        "seed": bundle.manifest.seed,
        "licence": "Apache-2.0",
        "site_profile": None,
    }
    assert (selection["by"], selection["certain"]) == ("default", False)
    assert selection["warning"]


def test_labels_are_those_of_the_report(results: Results) -> None:
    out, report = results
    (_, mask), (image, labels) = load(out, "mask"), load(out, "labels")
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels > 0, mask == 1)
    assert [f.label for f in report.findings] == sorted(np.unique(labels[labels > 0]))
    for finding in report.findings:
        voxels = np.argwhere(labels == finding.label)
        assert len(voxels) * 0.027 == pytest.approx(finding.volume_ml, abs=0.001)
        centroid = nib.affines.apply_affine(image.affine, voxels).mean(axis=0)
        assert centroid == pytest.approx(finding.centroid_mm, abs=0.01)


def test_healthy_scan_has_an_empty_mask(bundle: Bundle, tmp_path: Path) -> None:
    report = run_analysis(save_nifti(tmp_path / "healthy.nii.gz", brain()), tmp_path / "out", bundle)
    assert report.findings == ()
    assert report.lesion_volume_ml == 0
    assert report.work.slices_reversed < 3  # rounding to integers can bring an edge above the threshold of the KL map
    assert not load(tmp_path / "out", "mask")[1].any()


# ---- determinism -------------------------------------------------------------------------------


def test_same_scan_has_the_same_bytes(scan: Path, bundle: Bundle, results: Results, tmp_path: Path) -> None:
    renamed = tmp_path / "without extension"
    renamed.write_bytes(gzip.decompress(scan.read_bytes()))
    out = tmp_path / "out"
    report = run_analysis(renamed, out, bundle)
    for name in SAME_BYTES:
        assert (out / name).read_bytes() == (results[0] / name).read_bytes(), name
    before, after = (r.model_dump(exclude={"work": {"seconds"}}) for r in (results[1], report))
    assert before == after


def test_another_seed_changes_the_noise(scan: Path, bundle: Bundle, results: Results, tmp_path: Path) -> None:
    report = run_analysis(scan, tmp_path, bundle, AnalysisRequest(seed=12))
    assert report.model.seed == 12
    assert (tmp_path / "anomaly.nii.gz").read_bytes() != (results[0] / "anomaly.nii.gz").read_bytes()
    assert report.lesion_volume_ml == pytest.approx(results[1].lesion_volume_ml, rel=0.35)


# ---- DICOM -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["axial", "sagittal", "coronal"])
def dicom_results(
    request: pytest.FixtureRequest, volume: Volume, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    plane: Plane = request.param
    folder = tmp_path_factory.mktemp("dicom")
    files = write_series(folder / "series", volume, Series(plane=plane))
    return folder / "out", run_analysis(zip_files(folder / "series.zip", files), folder / "out", bundle)


def test_dicom_series_has_the_mask_of_its_nifti(results: Results, dicom_results: Results) -> None:
    first, second = (
        {tuple(p) for p in np.round(nib.affines.apply_affine(image.affine, np.argwhere(mask)) * 2).astype(int)}
        for image, mask in (load(results[0], "mask"), load(dicom_results[0], "mask"))
    )
    assert 2 * len(first & second) / (len(first) + len(second)) > 0.98


def test_only_dicom_results_contain_patient_data(dicom_results: Results) -> None:
    names = {path.name for path in dicom_results[0].iterdir()}
    assert names == {*REQUIRED_NAMES, *DICOM_NAMES}
    for name in REQUIRED_NAMES:
        content = (dicom_results[0] / name).read_bytes()
        assert SECRET.encode() not in (gzip.decompress(content) if name.endswith(".gz") else content), name


def test_dicom_segmentation_has_the_position_of_the_mask(dicom_results: Results) -> None:
    out, report = dicom_results
    image, mask = load(out, "mask")
    segments = segment_points(out / "segmentation.dcm")
    assert sorted(segments) == [f.label for f in report.findings]
    points = nib.affines.apply_affine(RAS_TO_LPS @ image.affine, np.argwhere(mask))
    assert sum(map(len, segments.values())) == len(points)
    np.testing.assert_allclose(np.concatenate(list(segments.values())).mean(axis=0), points.mean(axis=0), atol=1e-3)
    for finding in report.findings:
        centroid = nib.affines.apply_affine(RAS_TO_LPS, segments[finding.label].mean(axis=0))
        assert centroid == pytest.approx(finding.centroid_mm, abs=0.01)
        assert len(segments[finding.label]) * 0.027 == pytest.approx(finding.volume_ml, abs=0.001)


# ---- head with skull ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head_results(
    bundle: Bundle,
    small_cubes: None,  # noqa: ARG001 - a module fixture cannot be requested by a mark
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    folder = tmp_path_factory.mktemp("head")
    volume = with_lesion(head(HEAD_SHAPE, grid(HEAD_SHAPE)), LESION_MM, RADIUS_MM)
    scan = save_nifti(folder / "head.nii.gz", volume)
    return folder / "out", run_analysis(scan, folder / "out", with_extractor(bundle))


def test_head_has_a_brain_mask(head_results: Results) -> None:
    out, report = head_results
    image, mask = load(out, "brain")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(image.affine, grid(HEAD_SHAPE))
    assert report.brain is not None
    assert report.brain.volume_ml == pytest.approx(mask.sum() * 0.027, abs=0.1)
    assert (report.brain.method, report.brain.version, report.brain.sha256) == ("oracle", "1", "1" * 64)
    assert report.work.seconds["extract"] > 0


def test_only_the_brain_is_analysed(head_results: Results) -> None:
    out, _ = head_results
    (_, inside), (_, anomaly), (_, mask) = (load(out, name) for name in ("brain", "anomaly", "mask"))
    assert np.isnan(anomaly[ndimage.binary_dilation(inside) == 0]).all()
    assert np.isfinite(anomaly[inside == 1]).mean() > 0.9
    assert not mask[inside == 0].any()


def test_counterpart_of_a_head_keeps_the_skull(head_results: Results) -> None:
    out, _ = head_results
    (_, inside), (_, counterpart) = (load(out, name) for name in ("brain", "counterpart"))
    source = np.asarray(nib.load(out.parent / "head.nii.gz").dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    outside = ndimage.binary_dilation(inside) == 0
    assert source[outside].max() > 600
    np.testing.assert_array_equal(counterpart[outside], source[outside])


def test_head_has_the_lesion_of_its_brain(head_results: Results, bundle: Bundle, tmp_path: Path) -> None:
    volume = with_lesion(brain(HEAD_SHAPE, grid(HEAD_SHAPE)), LESION_MM, RADIUS_MM)
    report = run_analysis(save_nifti(tmp_path / "brain.nii.gz", volume), tmp_path / "out", bundle)
    (_, first), (_, second) = load(head_results[0], "mask"), load(tmp_path / "out", "mask")
    assert dice(first > 0, second > 0) > 0.9
    assert head_results[1].findings[0].centroid_mm == pytest.approx(report.findings[0].centroid_mm, abs=1)


@pytest.mark.usefixtures("small_cubes")
def test_extractor_does_not_change_the_results_of_a_skull_stripped_scan(
    scan: Path, bundle: Bundle, results: Results, tmp_path: Path
) -> None:
    report = run_analysis(scan, tmp_path, with_extractor(bundle))
    for name in SAME_BYTES:
        assert (tmp_path / name).read_bytes() == (results[0] / name).read_bytes(), name
    assert report.brain is None
    assert report.absent[BRAIN_NAME]["code"] == "no_brain_mask"
    assert report.findings == results[1].findings


@pytest.mark.usefixtures("small_cubes")
def test_head_without_a_brain_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    scan = save_nifti(tmp_path / "head.nii.gz", head(HEAD_SHAPE, grid(HEAD_SHAPE)))
    with pytest.raises(BrainNotExtracted):
        run_analysis(scan, tmp_path / "out", with_extractor(bundle, ExtractionNetworks(nothing, nothing)))
    assert list((tmp_path / "out").iterdir()) == []


# ---- progress, cancellation, refusal -----------------------------------------------------------


def test_progress_visits_each_stage_and_never_decreases(scan: Path, bundle: Bundle, tmp_path: Path) -> None:
    calls: list[tuple[str, float]] = []
    run_analysis(scan, tmp_path, bundle, progress=lambda stage, fraction: calls.append((stage, fraction)))
    stages = [stage for stage, _ in calls]
    assert list(dict.fromkeys(stages)) == ["read", "infer", "export"]
    for stage in ("read", "infer", "export"):
        fractions = [f for s, f in calls if s == stage]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
    assert stages.count("infer") > 6


@pytest.mark.parametrize("at", ["read", "infer", "export"])
def test_cancelled_analysis_leaves_no_file(scan: Path, bundle: Bundle, tmp_path: Path, at: str) -> None:
    def cancel(stage: str, _: float) -> None:
        if stage == at:
            raise Cancelled("Found.", expected="-", advice="-")

    with pytest.raises(Cancelled):
        run_analysis(scan, tmp_path, bundle, progress=cancel)
    assert list(tmp_path.iterdir()) == []


def test_refused_scan_leaves_no_file(bundle: Bundle, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "scan.nii.gz"
    text.write_text("This is not a scan.")
    with pytest.raises(NotAnImageFormat):
        run_analysis(text, out, bundle)
    with pytest.raises(WrongFieldOfView):
        run_analysis(save_nifti(tmp_path / "small.nii.gz", brain(scale=0.6)), out, bundle)
    assert list(out.iterdir()) == []


def test_unknown_model_is_refused(scan: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="'flair'"):
        run_analysis(scan, tmp_path, bundle, AnalysisRequest(model="flair"))


def test_ct_is_refused_by_an_mr_model(volume: Volume, bundle: Bundle, tmp_path: Path) -> None:
    write_series(tmp_path / "ct", volume, Series(modality="CT"))
    with pytest.raises(WrongModality):
        run_analysis(tmp_path / "ct", tmp_path / "out", bundle, AnalysisRequest(model="tiny"))


@pytest.mark.usefixtures("small_cubes")
def test_refusal_states_what_was_assumed_and_the_way_out(bundle: Bundle, tmp_path: Path) -> None:
    small = save_nifti(tmp_path / "small.nii.gz", brain(scale=0.6))
    whole = save_nifti(tmp_path / "head.nii.gz", head(HEAD_SHAPE, grid(HEAD_SHAPE)))
    nothing_extracted = with_extractor(bundle, ExtractionNetworks(nothing, nothing))
    for path, used, error in ((small, bundle, WrongFieldOfView), (whole, nothing_extracted, BrainNotExtracted)):
        with pytest.raises(error) as refused:
            run_analysis(path, tmp_path / "out", used)
        assert "states neither its modality nor its sequence. MR, T1 was assumed. The model is tiny-0.0.1." in str(
            refused.value
        )
        assert "?model= (or --model): tiny-0.0.1 (MR, T1)" in refused.value.advice


def test_refusal_of_a_certain_selection_is_unchanged(bundle: Bundle, tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "small.nii.gz", brain(scale=0.6))
    with pytest.raises(WrongFieldOfView) as refused:
        run_analysis(path, tmp_path / "out", bundle, AnalysisRequest(model="tiny"))
    assert "assumed" not in str(refused.value)
    assert "?model=" not in refused.value.advice
