"""The preview picture: it shows what the results contain."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.export.preview import (
    COLUMNS,
    MASK_COLOUR,
    PANEL_WIDTH,
    ROWS,
    WARNING_COLOUR,
    View,
    choose_planes,
    draw_preview,
    outlines,
    sample_plane,
)
from app.export.report import ModelSelectionReport, Report, build_report, by_certainty
from app.pipeline.detect import ScanResult, to_scan_result
from app.pipeline.methods import METHODS
from app.runtime.bundle import Bundle, load_bundle
from app.volume import Affine, Scan, Source, Volume
from tests.support.grids import tilted
from tests.support.phantom import brain, grid, with_lesion
from tests.support.results import MODEL

SHAPE = (58, 70, 52)
BALLS = (((25.0, 10.0, 20.0), 15.0), ((-30.0, -20.0, -12.0), 11.0))
GRIDS = {"axial": grid(SHAPE), "oblique": tilted(grid(SHAPE), 6, -9, 14)}


@pytest.fixture(scope="module")
def bundle(tiny_models: Path) -> Bundle:
    return load_bundle(tiny_models / "tiny-0.0.1", threads=1)


def analyse(bundle: Bundle, volume: Volume) -> tuple[ScanResult, Report]:
    networks = bundle.networks.in_batches(bundle.batch, lambda _: None)
    detection = METHODS[bundle.manifest.method](volume, networks, bundle.manifest)
    result = to_scan_result(volume, detection, bundle.manifest)
    scan = Scan(volume, Source("nifti"))
    return result, build_report(scan, result, MODEL, bundle.manifest, None, {})


@pytest.fixture(scope="module", params=GRIDS)
def analysed(request: pytest.FixtureRequest, bundle: Bundle) -> tuple[ScanResult, Report]:
    volume = brain(SHAPE, GRIDS[request.param])
    for centre, radius in BALLS:
        volume = with_lesion(volume, centre, radius)
    return analyse(bundle, volume)


def draw(path: Path, result: ScanResult, report: Report) -> np.ndarray:
    draw_preview(result, report).save(path)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def count(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((pixels == colour).all(axis=-1).sum())


def test_planes_show_the_labels_of_the_mask(analysed: tuple[ScanResult, Report]) -> None:
    result, _ = analysed
    view = View(90.2, 100.3, 180, 200, 1.0)  # no pixel lies between two voxels
    change = np.zeros_like(result.detection.counterpart)
    planes = choose_planes(result)
    assert planes == sorted(planes, reverse=True)
    assert 2 <= len(planes) <= ROWS
    shown: set[int] = set()
    for z_mm in planes:
        plane = sample_plane(result, change, view, z_mm)
        indices = np.round(nearest(result.affine, view.points(z_mm))).astype(int)
        inside = ((indices >= 0) & (indices < SHAPE)).all(axis=-1)
        expected = np.zeros(plane.labels.shape, int)
        expected[inside] = result.labels[tuple(indices[inside].T)]
        assert (plane.labels != expected).mean() == 0
        shown |= set(np.unique(plane.labels).tolist())
    assert {lesion.label for lesion in result.lesions[:2]} <= shown


def nearest(affine: Affine, points: np.ndarray) -> np.ndarray:
    inverse = np.linalg.inv(affine)
    return np.asarray(points @ inverse[:3, :3].T + inverse[:3, 3])


def test_plane_has_the_position_and_values_of_the_scan(bundle: Bundle) -> None:
    volume = with_lesion(brain(SHAPE, grid(SHAPE)), *BALLS[0])
    result, _ = analyse(bundle, volume)
    view = View(90.0, 100.0, 180, 200, 1.0)
    plane = sample_plane(result, np.zeros_like(result.detection.counterpart), view, 20.0)
    assert view.points(20.0)[90, 65] == pytest.approx([25.0, 10.0, 20.0])  # right is left, anterior is up
    assert plane.labels[90, 65] > 0
    assert plane.labels[90, 115] == 0
    nearby = tuple(np.round(nearest(volume.affine, view.points(20.0)[90, 65])).astype(int))
    scaled = plane.scan[90, 65] * result.detection.slices.grid.scale + result.detection.slices.grid.background
    assert scaled == pytest.approx(volume.array[nearby], rel=0.1)


def test_outlines_are_around_each_finding_and_cover_none() -> None:
    labels = np.zeros((20, 20), np.uint16)
    labels[4:8, 4:8], labels[12:16, 12:14] = 1, 2
    drawn = outlines(labels)
    assert not (drawn & (labels > 0)).any()
    assert drawn[2, 2]
    assert drawn[3, 5]
    assert not drawn[1, 5]
    assert drawn[13, 11]


def test_findings_are_outlined(analysed: tuple[ScanResult, Report], tmp_path: Path) -> None:
    pixels = draw(tmp_path / "a.png", *analysed)
    assert pixels.shape[1] > len(COLUMNS) * PANEL_WIDTH
    assert count(pixels, MASK_COLOUR) > 100
    assert count(pixels, WARNING_COLOUR) == 0
    # Red belongs to the outlines of the last panel; the map is a blend.
    columns = np.flatnonzero((pixels == MASK_COLOUR).all(axis=-1).any(axis=0))
    assert columns.min() > 3 * PANEL_WIDTH


def test_healthy_scan_has_no_outline(bundle: Bundle, tmp_path: Path) -> None:
    result, report = analyse(bundle, brain(SHAPE, grid(SHAPE)))
    assert result.lesions == ()
    assert count(draw(tmp_path / "a.png", result, report), MASK_COLOUR) == 0


def test_a_finding_without_voxels_in_the_slices_is_not_drawn(
    analysed: tuple[ScanResult, Report], tmp_path: Path
) -> None:
    """The picture is drawn from the labels, not from the slices of the model."""
    result, report = analysed
    empty = replace(result, labels=np.zeros_like(result.labels), lesions=())
    without = report.model_copy(update={"findings": (), "lesion_volume_ml": 0.0})
    assert count(draw(tmp_path / "a.png", empty, without), MASK_COLOUR) == 0


def test_warnings_are_shown(analysed: tuple[ScanResult, Report], tmp_path: Path) -> None:
    result, report = analysed
    warned = report.model_copy(update={"warnings": ("The file states no modality.",)})
    assert count(draw(tmp_path / "a.png", result, warned), WARNING_COLOUR) > 50


def test_a_scan_far_outside_the_calibration_is_warned_of_first(
    analysed: tuple[ScanResult, Report], bundle: Bundle
) -> None:
    result, report = analysed
    high = bundle.manifest.calibration.scan_score.high
    selection = ModelSelectionReport(by="default", certain=False, warning="The file states no modality.")
    model = MODEL.model_copy(update={"selection": selection})
    scan = Scan(result.volume, Source("nifti"))
    for factor, expected in ((1.9, 1), (2.1, 2)):
        scores = replace(result.detection.scores, scan=factor * high)
        far = replace(result, detection=replace(result.detection, scores=scores))
        warnings = build_report(scan, far, model, bundle.manifest, None, {}).warnings
        assert len(warnings) == expected
        assert warnings[0].startswith("Not calibrated for this scanner") == (expected == 2)
    assert report.warnings == ()


def test_surest_findings_come_first(analysed: tuple[ScanResult, Report]) -> None:
    findings = by_certainty(analysed[1].findings)
    assert [f.peak_score for f in findings] == sorted((f.peak_score for f in findings), reverse=True)
    assert sorted(f.label for f in findings) == [f.label for f in analysed[1].findings]
