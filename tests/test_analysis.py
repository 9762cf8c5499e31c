"""A file in, files out: the chain that the command line and the worker call."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

from app.export.outputs import BRAIN_NAME, DICOM_NAMES, REQUIRED_NAMES
from app.analysis import Progress, AnalysisRequest, analyse
from app.brain import Networks
from app.errors import BrainNotExtracted, Cancelled, NotAnImageFormat, UnknownModel, WrongFieldOfView, WrongModality
from app.export.report import Report
from app.manifest import ExtractorFiles, ExtractorManifest, File, Manifest
from app.pipeline.findings import dice
from app.runtime.bundle import Bundle, load_bundle
from app.runtime.extractor import Extractor
from app.volume import Volume
from tests.support.dicom import RAS_TO_LPS, SECRET, Series, write_series, zipped
from tests.support.heads import ORACLE, nothing
from tests.support.phantom import LESION_MM, RADIUS_MM, ball, brain, grid, head, with_lesion
from tests.support.segmentation import segment_points

PLAIN = AnalysisRequest()
TURN = np.eye(4)
TURN[:3, :3] = Rotation.from_euler("xyz", (6, -9, 14), degrees=True).as_matrix()
# Oblique, along left and posterior, and rounded as NIfTI keeps it.
SHAPE = (58, 70, 52)
AFFINE = (TURN @ grid(SHAPE) @ np.array([[-1, 0, 0, 57], [0, -1, 0, 69], [0, 0, 1, 0], [0, 0, 0, 1]])).astype("f4")


@pytest.fixture(scope="module")
def bundle(tiny_models: Path) -> Bundle:
    return load_bundle(tiny_models / "tiny-0.0.1", threads=1)


@pytest.fixture(scope="module")
def volume() -> Volume:
    return with_lesion(brain(SHAPE, AFFINE.astype(np.float64)), LESION_MM, RADIUS_MM)


@pytest.fixture(scope="module")
def scan(volume: Volume, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("scan") / "scan.nii.gz", volume)


@pytest.fixture(scope="module")
def done(scan: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("out")
    return out, run(scan, out, bundle)


def save(path: Path, volume: Volume) -> Path:
    image = nib.Nifti1Image(np.round(volume.array).astype(np.int16), volume.affine)
    image.set_sform(volume.affine, code=1)
    image.set_qform(volume.affine, code=1)
    image.to_filename(path)
    return path


def quiet(stage: str, fraction: float) -> None:
    assert stage in {"read", "infer", "export"}
    assert 0 <= fraction <= 1


def run(path: Path, out: Path, bundle: Bundle, request: Request = PLAIN, progress: Progress = quiet) -> Report:
    def load(manifest: Manifest) -> Bundle:
        assert manifest == bundle.manifest
        return bundle

    return analyse(path, out, load, [bundle.manifest], request, progress)


def load(out: Path, name: str) -> tuple[nib.Nifti1Image, np.ndarray]:
    image = nib.load(out / f"{name}.nii.gz")
    assert isinstance(image, nib.Nifti1Image)
    return image, np.asarray(image.dataobj)


# ---- what is written ---------------------------------------------------------------------------


def test_exactly_the_named_files_are_written(done: tuple[Path, Report]) -> None:
    assert sorted(p.name for p in done[0].iterdir()) == sorted(REQUIRED_NAMES)


@pytest.mark.parametrize(("name", "kind"), [("mask", np.uint8), ("anomaly", np.float32), ("counterpart", np.float32)])
def test_results_lie_on_the_scans_own_grid(
    scan: Path, done: tuple[Path, Report], name: str, kind: type[np.generic]
) -> None:
    image, array = load(done[0], name)
    given = nib.load(scan)
    assert isinstance(given, nib.Nifti1Image)
    assert image.shape == SHAPE
    assert array.dtype == kind
    sform, code = image.get_sform(coded=True)
    np.testing.assert_array_equal(sform, given.get_sform())
    assert code == 1
    qform, qcode = image.get_qform(coded=True)
    np.testing.assert_allclose(qform, sform, atol=1e-3)
    assert qcode == 1
    assert image.header.get_xyzt_units()[0] == "mm"
    assert tuple(image.header["scl_slope"].ravel()) in {(1.0,), (np.nan,)} or np.isnan(image.header["scl_slope"])


def test_the_lesion_is_in_the_mask_at_its_place(volume: Volume, done: tuple[Path, Report]) -> None:
    """From the written file alone: its voxels, and its own affine."""
    image, mask = load(done[0], "mask")
    assert np.unique(mask).tolist() == [0, 1]
    truth = ball(volume, LESION_MM, RADIUS_MM)
    # A latent is 12 mm wide, the lesion 30: this is what such a coarse model can do.
    assert 2 * (truth & (mask == 1)).sum() / (truth.sum() + mask.sum()) > 0.65
    centroid = nib.affines.apply_affine(image.affine, np.argwhere(mask)).mean(axis=0)
    assert centroid == pytest.approx(LESION_MM, abs=3.0)


def test_maps_agree_with_the_mask_and_the_scan(scan: Path, done: tuple[Path, Report]) -> None:
    (_, mask), (_, anomaly), (_, counterpart) = (load(done[0], name) for name in ("mask", "anomaly", "counterpart"))
    given = np.asarray(nib.load(scan).dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    report = done[1]
    assert (anomaly[mask == 1] > report.extent_threshold).all()
    assert np.isnan(anomaly[given == 0]).mean() > 0.95
    quiet_voxels = np.isnan(anomaly) | (anomaly == 0)
    np.testing.assert_array_equal(counterpart[(given == 0) & np.isnan(anomaly)], 0)
    assert (counterpart == given)[quiet_voxels].mean() > 0.98
    assert np.abs(counterpart - given)[mask == 1].mean() > 100  # of about 800


def test_the_report_is_what_was_returned_and_adds_up(done: tuple[Path, Report]) -> None:
    out, report = done
    assert Report.model_validate_json((out / "report.json").read_text()) == report
    _, mask = load(out, "mask")
    _, anomaly = load(out, "anomaly")
    assert report.lesion_volume_ml == pytest.approx(mask.sum() * 0.027, abs=0.001)
    assert sum(f.volume_ml for f in report.findings) == pytest.approx(report.lesion_volume_ml, abs=0.002)
    assert report.findings[0].centroid_mm == pytest.approx(LESION_MM, abs=3.0)
    assert report.findings[0].peak_score == pytest.approx(np.nanmax(anomaly[mask == 1]), abs=1e-4)
    assert report.analysed.volume_ml == pytest.approx(np.isfinite(anomaly).sum() * 0.027, abs=0.1)
    assert report.input.shape == SHAPE
    assert report.input.spacing_mm == pytest.approx((3, 3, 3), abs=1e-4)
    assert report.scores.fraction_out == 0
    analysed = report.analysed.slices - len(report.analysed.slices_not_analysed)
    assert report.work.network_evaluations == 3 * analysed + 5 * report.work.slices_reversed + 8
    assert 0 < report.work.slices_reversed < analysed
    assert sum(s is None for s in report.scores.slices) == len(report.analysed.slices_not_analysed)
    by_slice = [s for s in report.scores.slices if s is not None]
    assert min(by_slice) < report.scores.scan < max(by_slice)
    assert set(report.work.seconds) >= {"read", "infer", "export"}


def test_the_report_says_where_it_comes_from(bundle: Bundle, done: tuple[Path, Report]) -> None:
    document = json.loads((done[0] / "report.json").read_text())
    assert document["research_use_only"] is True
    assert "Not a medical device" in document["notice"]
    assert document["model"] == {
        "id": "tiny-0.0.1",
        "sha256": bundle.sha256,
        "provider": "cpu",
        "precision": "float32",
        "seed": bundle.manifest.seed,
        "licence": "Apache-2.0",
        "choice": {
            "by": "default",
            "sure": False,
            "doubt": "The file says neither its modality nor its sequence: it was taken for MR, T1.",
        },
    }


def test_the_preview_is_a_picture(done: tuple[Path, Report]) -> None:
    with Image.open(done[0] / "preview.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.std() > 10
    assert (pixels.max(axis=2) - pixels.min(axis=2)).max() > 60  # the finding is coloured


# ---- the same bytes ----------------------------------------------------------------------------


def test_the_same_scan_gives_the_same_bytes(
    scan: Path, bundle: Bundle, done: tuple[Path, Report], tmp_path: Path
) -> None:
    renamed = tmp_path / "without an ending"
    renamed.write_bytes(gzip.decompress(scan.read_bytes()))
    out = tmp_path / "out"
    out.mkdir()
    report = run(renamed, out, bundle)
    for name in REQUIRED_NAMES:
        if name != "report.json":
            assert (out / name).read_bytes() == (done[0] / name).read_bytes(), name
    before, after = (r.model_dump(exclude={"work": {"seconds"}}) for r in (done[1], report))
    assert before == after


def test_another_seed_is_other_noise_and_is_told(
    scan: Path, bundle: Bundle, done: tuple[Path, Report], tmp_path: Path
) -> None:
    report = run(scan, tmp_path, bundle, AnalysisRequest(seed=12))
    assert report.model.seed == 12
    assert (tmp_path / "anomaly.nii.gz").read_bytes() != (done[0] / "anomaly.nii.gz").read_bytes()
    assert report.lesion_volume_ml == pytest.approx(done[1].lesion_volume_ml, rel=0.35)


@pytest.mark.parametrize("plane", ["axial", "sagittal"])
def test_a_dicom_series_gives_the_mask_of_its_nifti(
    volume: Volume, bundle: Bundle, done: tuple[Path, Report], tmp_path: Path, plane: str
) -> None:
    files = write_series(tmp_path / "series", volume, Series(plane=plane))  # type: ignore[arg-type]
    out = tmp_path / "out"
    out.mkdir()
    run(zipped(tmp_path / "series.zip", files), out, bundle)
    (first, mask), (second, other) = load(done[0], "mask"), load(out, "mask")
    here, there = (
        {tuple(p) for p in np.round(nib.affines.apply_affine(i.affine, np.argwhere(m)) * 2).astype(int)}
        for i, m in ((first, mask), (second, other))
    )
    assert 2 * len(here & there) / (len(here) + len(there)) > 0.98
    for name in REQUIRED_NAMES:  # those of `DICOM_FILES` belong to the patient, and say so
        file = out / name
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        assert SECRET.encode() not in content, file.name


@pytest.mark.parametrize("plane", ["axial", "coronal"])
def test_a_dicom_series_has_dicom_results_at_the_place_of_the_mask(
    volume: Volume, bundle: Bundle, tmp_path: Path, plane: str
) -> None:
    files = write_series(tmp_path / "series", volume, Series(plane=plane))  # type: ignore[arg-type]
    out = tmp_path / "out"
    out.mkdir()
    report = run(zipped(tmp_path / "series.zip", files), out, bundle)
    assert sorted(p.name for p in out.iterdir()) == sorted((*REQUIRED_NAMES, *DICOM_NAMES))
    assert set(report.absent) == {BRAIN_NAME}
    image, mask = load(out, "mask")
    found = segment_points(out / "segmentation.dcm")
    assert sorted(found) == [f.label for f in report.findings]
    points = nib.affines.apply_affine(RAS_TO_LPS @ image.affine, np.argwhere(mask))
    assert sum(len(p) for p in found.values()) == len(points)
    np.testing.assert_allclose(np.concatenate(list(found.values())).mean(axis=0), points.mean(axis=0), atol=1e-3)
    for finding in report.findings:
        centroid = nib.affines.apply_affine(RAS_TO_LPS, found[finding.label].mean(axis=0))
        assert centroid == pytest.approx(finding.centroid_mm, abs=0.01)
        assert len(found[finding.label]) * 0.027 == pytest.approx(finding.volume_ml, abs=0.001)


def test_a_healthy_dicom_series_has_a_report_and_no_segmentation(bundle: Bundle, tmp_path: Path) -> None:
    write_series(tmp_path / "series", brain())
    out = tmp_path / "out"
    out.mkdir()
    report = run(tmp_path / "series", out, bundle)
    assert sorted(p.name for p in out.iterdir()) == sorted((*REQUIRED_NAMES, "report.dcm"))
    codes = {name: problem["code"] for name, problem in report.absent.items()}
    assert codes == {BRAIN_NAME: "no_brain_mask", "segmentation.dcm": "no_lesion"}
    assert Report.model_validate_json((out / "report.json").read_text()).absent == report.absent


def test_a_nifti_scan_says_why_it_has_no_dicom_results(done: tuple[Path, Report]) -> None:
    codes = {name: problem["code"] for name, problem in done[1].absent.items()}
    assert codes == {BRAIN_NAME: "no_brain_mask"} | dict.fromkeys(DICOM_NAMES, "not_from_dicom")


# ---- a head with its skull -----------------------------------------------------------------------

ROOMY = (76, 88, 80)


def with_extractor(bundle: Bundle, networks: Networks = ORACLE) -> Bundle:
    nothing_there = File(name="none", sha256="0" * 64)
    files = ExtractorFiles(coarse=nothing_there, fine=nothing_there, golden=nothing_there)
    manifest = ExtractorManifest(
        method="oracle", version="1", licence="none", attribution="none", source_sha256="0" * 64, files=files
    )
    return replace(bundle, extractor=Extractor(manifest, "1" * 64, networks))


@pytest.fixture(scope="module")
def from_head(
    bundle: Bundle,
    small_cubes: None,  # noqa: ARG001  # a fixture of the module's scope cannot be asked for by a mark
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("head")
    scan = save(folder / "head.nii.gz", with_lesion(head(ROOMY, grid(ROOMY)), LESION_MM, RADIUS_MM))
    out = folder / "out"
    out.mkdir()
    return out, run(scan, out, with_extractor(bundle))


def test_a_head_has_the_brains_mask_beside_its_results(from_head: tuple[Path, Report]) -> None:
    out, report = from_head
    assert sorted(p.name for p in out.iterdir()) == sorted((*REQUIRED_NAMES, BRAIN_NAME))
    image, taken = load(out, "brain")
    assert taken.dtype == np.uint8
    np.testing.assert_array_equal(image.affine, grid(ROOMY))
    assert report.brain is not None
    assert report.brain.volume_ml == pytest.approx(taken.sum() * 0.027, abs=0.1)
    assert (report.brain.method, report.brain.version, report.brain.sha256) == ("oracle", "1", "1" * 64)
    assert BRAIN_NAME not in report.absent
    assert report.work.seconds["extract"] > 0


def test_outside_the_brain_nothing_is_said(from_head: tuple[Path, Report]) -> None:
    out, _ = from_head
    (_, taken), (_, anomaly), (_, mask) = (load(out, name) for name in ("brain", "anomaly", "mask"))
    assert np.isnan(anomaly[ndimage.binary_dilation(taken) == 0]).all()
    assert np.isfinite(anomaly[taken == 1]).mean() > 0.9
    assert not mask[taken == 0].any()


def test_the_counterpart_of_a_head_keeps_its_skull(from_head: tuple[Path, Report]) -> None:
    out, _ = from_head
    (_, taken), (_, counterpart) = (load(out, name) for name in ("brain", "counterpart"))
    given = np.asarray(nib.load(out.parent / "head.nii.gz").dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    outside = ndimage.binary_dilation(taken) == 0
    assert given[outside].max() > 600
    np.testing.assert_array_equal(counterpart[outside], given[outside])


def test_a_lesion_is_found_in_a_head_as_in_its_brain(
    from_head: tuple[Path, Report], bundle: Bundle, tmp_path: Path
) -> None:
    alone = save(tmp_path / "brain.nii.gz", with_lesion(brain(ROOMY, grid(ROOMY)), LESION_MM, RADIUS_MM))
    out = tmp_path / "out"
    out.mkdir()
    report = run(alone, out, bundle)
    (_, here), (_, there) = load(from_head[0], "mask"), load(out, "mask")
    assert dice(here > 0, there > 0) > 0.95
    assert from_head[1].findings[0].centroid_mm == pytest.approx(report.findings[0].centroid_mm, abs=1)


@pytest.mark.usefixtures("small_cubes")
def test_a_brain_alone_has_the_same_bytes_with_an_extractor_as_without(
    scan: Path, bundle: Bundle, done: tuple[Path, Report], tmp_path: Path
) -> None:
    report = run(scan, tmp_path, with_extractor(bundle))
    for name in REQUIRED_NAMES:
        if name != "report.json":
            assert (tmp_path / name).read_bytes() == (done[0] / name).read_bytes(), name
    assert report.brain is None
    assert "alone" in report.absent[BRAIN_NAME]["found"]
    assert report.findings == done[1].findings


@pytest.mark.usefixtures("small_cubes")
def test_a_head_without_a_brain_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    scan = save(tmp_path / "head.nii.gz", head(ROOMY, grid(ROOMY)))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BrainNotExtracted):
        run(scan, out, with_extractor(bundle, Networks(nothing, nothing)))
    assert list(out.iterdir()) == []


# ---- healthy, refused, stopped -----------------------------------------------------------------


def test_a_healthy_scan_has_an_empty_mask(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    report = run(save(tmp_path / "healthy.nii.gz", brain()), out, bundle)
    assert report.findings == ()
    assert report.lesion_volume_ml == 0
    assert report.work.slices_reversed < 3  # rounded to integers, an edge may pass the threshold of the KL map
    assert not load(out, "mask")[1].any()
    assert sorted(p.name for p in out.iterdir()) == sorted(REQUIRED_NAMES)


def test_progress_goes_through_the_stages_and_only_forward(scan: Path, bundle: Bundle, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    run(scan, tmp_path, bundle, progress=lambda stage, fraction: told.append((stage, fraction)))
    stages = [stage for stage, _ in told]
    assert list(dict.fromkeys(stages)) == ["read", "infer", "export"]
    for stage in ("read", "infer", "export"):
        fractions = [f for s, f in told if s == stage]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
    assert stages.count("infer") > 6


@pytest.mark.parametrize("at", ["read", "infer", "export"])
def test_cancelling_leaves_no_file_that_looks_finished(scan: Path, bundle: Bundle, tmp_path: Path, at: str) -> None:
    def stop(stage: str, _: float) -> None:
        if stage == at:
            raise Cancelled("Asked to stop.", expected="-", advice="-")

    with pytest.raises(Cancelled):
        run(scan, tmp_path, bundle, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_analysed_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    text = tmp_path / "scan.nii.gz"
    text.write_text("This is not a scan, whatever it is called.")
    with pytest.raises(NotAnImageFormat):
        run(text, out, bundle)
    child = save(tmp_path / "small.nii.gz", brain(scale=0.6))
    with pytest.raises(WrongFieldOfView):
        run(child, out, bundle)
    assert list(out.iterdir()) == []


def test_a_model_that_is_not_there_is_refused(scan: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="'flair'"):
        run(scan, tmp_path, bundle, AnalysisRequest(model="flair"))


def test_a_ct_is_no_t1(volume: Volume, bundle: Bundle, tmp_path: Path) -> None:
    write_series(tmp_path / "ct", volume, Series(modality="CT"))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(WrongModality):
        run(tmp_path / "ct", out, bundle, AnalysisRequest(model="tiny"))
