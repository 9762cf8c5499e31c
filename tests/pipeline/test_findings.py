"""Findings on the grid of the scan, compared with values that are known."""

from dataclasses import replace

import numpy as np
import pytest
from nibabel import affines
from scipy import ndimage
from scipy.spatial.transform import Rotation

from app.manifest import Manifest
from app.pipeline.detect import Detection, detect, to_scan_result
from app.pipeline.diffusion import Networks
from app.pipeline.findings import dice, label_findings
from app.pipeline.out_of_distribution import ScanScores
from app.pipeline.preprocess import to_slices
from app.volume import Volume
from tests.support.bundle import tiny_manifest, with_part
from tests.support.phantom import LESION_MM, ball, brain, grid, with_lesion

ROTATION = np.eye(4)
ROTATION[:3, :3] = Rotation.from_euler("xyz", (10, -15, 20), degrees=True).as_matrix()
# Axes along left, posterior and superior, as in most DICOM series.
LPS = grid() @ np.array([[-1, 0, 0, 51], [0, -1, 0, 63], [0, 0, 1, 0], [0, 0, 0, 1]])
GRIDS = {
    "RAS": ((52, 64, 48), grid()),
    "LPS": ((52, 64, 48), LPS),
    "oblique": ((62, 72, 58), ROTATION @ grid((62, 72, 58))),
    "thick": ((70, 84, 26), grid((70, 84, 26), (2.2, 2.2, 5.0))),
}


def empty_detection(volume: Volume, manifest: Manifest) -> Detection:
    """Return a detection without findings."""
    slices = to_slices(volume, manifest.preprocessing)
    n, _, height, width = slices.x.shape
    latents = np.zeros((n, height // 4, width // 4))
    anomaly = np.where(slices.foreground, np.float32(0), np.float32(np.nan))
    scores = ScanScores(0.0, np.zeros(n, dtype=np.float32), ((0.0, 0.0),), 0.0, 0.0)
    return Detection(
        slices, np.ones(n, dtype=bool), latents.astype(np.float32), latents > 0, slices.x[:, 0], anomaly, scores, (0,)
    )


def detection_of_balls(
    volume: Volume, manifest: Manifest, *balls: tuple[tuple[float, float, float], float, float]
) -> Detection:
    """Return a detection of balls: centre in mm, radius in mm, value of the anomaly map."""
    detection = empty_detection(volume, manifest)
    on = detection.slices.grid
    points = affines.apply_affine(on.affine, np.moveaxis(np.indices(on.shape), 0, -1))
    anomaly = detection.anomaly.copy()
    for centre, radius, value in balls:
        anomaly[np.linalg.norm(points - np.array(centre), axis=-1) <= radius] = value
    return replace(detection, anomaly=anomaly)


@pytest.mark.parametrize("name", GRIDS)
def test_lesion_is_described(name: str, manifest: Manifest) -> None:
    volume = brain(*GRIDS[name])
    result = to_scan_result(volume, detection_of_balls(volume, manifest, (LESION_MM, 15.0, 0.4)), manifest)
    (lesion,) = result.lesions
    assert lesion.label == 1
    assert lesion.volume_ml == pytest.approx(4 / 3 * np.pi * 1.5**3, rel=0.25)  # and a rim
    assert lesion.volume_ml == pytest.approx(result.mask.sum() * volume.voxel_ml)
    assert lesion.centroid_mm == pytest.approx(LESION_MM, abs=0.9)
    assert lesion.peak == pytest.approx(0.4, abs=1e-3)
    assert manifest.residual.threshold < lesion.mean <= lesion.peak + 1e-9
    reach = float(15 + np.linalg.norm(volume.spacing) / 2)
    for low, high, at in zip(*lesion.box_mm, LESION_MM, strict=True):
        assert low == pytest.approx(at - 15, abs=reach - 12)
        assert high == pytest.approx(at + 15, abs=reach - 12)
    per_slice = result.mask.sum(axis=(0, 1))
    assert per_slice[lesion.key_slice] == per_slice.max()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("change", [0.125, -0.25])
def test_difference_is_that_of_scan_and_counterpart_in_units_of_the_scan(
    name: str, change: float, manifest: Manifest
) -> None:
    volume = brain(*GRIDS[name])
    detection = detection_of_balls(volume, manifest, (LESION_MM, 15.0, 0.4))
    changed = replace(detection, counterpart=detection.slices.x[:, 0] - np.float32(change))
    result = to_scan_result(volume, changed, manifest)
    assert result.lesions[0].difference == pytest.approx(change * detection.slices.grid.scale, rel=1e-4)
    inside = result.labels == 1
    written = float((volume.array[inside] - result.counterpart[inside]).mean())
    assert result.lesions[0].difference == pytest.approx(written, rel=0.05), "the counterpart that is written"


def test_difference_next_to_a_slice_that_was_not_analysed_is_a_number(manifest: Manifest) -> None:
    volume = brain()
    detection = detection_of_balls(volume, manifest, (LESION_MM, 15.0, 0.4))
    counterpart = detection.slices.x[:, 0] - np.float32(0.1)
    middle = int(np.nanargmax(np.where(np.isfinite(detection.anomaly), detection.anomaly, -1).max(axis=(1, 2))))
    counterpart[middle] = np.nan
    result = to_scan_result(volume, replace(detection, counterpart=counterpart), manifest)
    assert np.isfinite(result.lesions[0].difference)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_key_plane_is_axial_whatever_the_axes(axes: tuple[int, int, int], manifest: Manifest) -> None:
    plain = brain(*GRIDS["thick"])
    volume = Volume(plain.array.transpose(axes), plain.affine[:, [*axes, 3]])
    result = to_scan_result(volume, detection_of_balls(volume, manifest, (LESION_MM, 15.0, 0.4)), manifest)
    (lesion,) = result.lesions
    heights = affines.apply_affine(volume.affine, np.argwhere(result.labels))[:, 2].round(3)
    planes, counts = np.unique(heights, return_counts=True)
    assert counts[np.isclose(planes, lesion.key_z_mm, atol=0.01)].tolist() == [counts.max()]


@pytest.mark.parametrize("name", GRIDS)
def test_centroid_of_the_mask_is_that_of_the_lesion(name: str, manifest: Manifest) -> None:
    volume = brain(*GRIDS[name])
    result = to_scan_result(volume, detection_of_balls(volume, manifest, (LESION_MM, 15.0, 0.4)), manifest)
    assert result.mask.shape == result.anomaly.shape == result.counterpart.shape == volume.shape
    np.testing.assert_array_equal(result.affine, volume.affine)
    assert result.mask.dtype == np.uint8
    assert np.unique(result.mask).tolist() == [0, 1]
    centroid = affines.apply_affine(result.affine, np.argwhere(result.mask)).mean(axis=0)
    assert centroid == pytest.approx(result.lesions[0].centroid_mm, abs=0.006)
    truth = ball(volume, LESION_MM, 15.0)
    assert 2 * (truth & (result.mask > 0)).sum() / (truth.sum() + result.mask.sum()) > 0.85


def test_lesions_are_sorted_by_size_and_small_ones_dropped(manifest: Manifest) -> None:
    volume = brain()
    balls = (((-30.0, 0.0, 0.0), 9.0, 0.3), ((30.0, 20.0, 10.0), 15.0, 0.5), ((0.0, -50.0, 0.0), 4.0, 0.9))
    result = to_scan_result(volume, detection_of_balls(volume, manifest, *balls), manifest)
    assert [lesion.label for lesion in result.lesions] == [1, 2]
    assert result.lesions[0].centroid_mm == pytest.approx((30, 20, 10), abs=0.9)
    assert result.lesions[1].centroid_mm == pytest.approx((-30, 0, 0), abs=0.9)
    for lesion in result.lesions:
        voxels = np.argwhere(result.labels == lesion.label)
        assert len(voxels) * volume.voxel_ml == pytest.approx(lesion.volume_ml)
        assert affines.apply_affine(volume.affine, voxels).mean(axis=0) == pytest.approx(lesion.centroid_mm, abs=0.006)
    np.testing.assert_array_equal(result.mask, result.labels > 0)
    assert all(lesion.volume_ml >= manifest.residual.min_lesion_ml for lesion in result.lesions)
    # The third ball has 0.27 ml and is not in the mask.
    assert result.mask.sum() * volume.voxel_ml == pytest.approx(sum(lesion.volume_ml for lesion in result.lesions))
    all_kept = with_part(manifest, "residual", min_lesion_ml=0.0)
    assert len(to_scan_result(volume, detection_of_balls(volume, manifest, *balls), all_kept).lesions) == 3


def test_findings_that_touch_at_a_corner_are_connected(manifest: Manifest) -> None:
    volume = brain()
    detection = empty_detection(volume, manifest)
    anomaly = detection.anomaly.copy()
    anomaly[18:22, 30:34, 26:30] = 0.5
    anomaly[22:26, 34:38, 30:34] = 0.5
    result = to_scan_result(volume, replace(detection, anomaly=anomaly), manifest)
    assert len(result.lesions) == 1
    assert result.mask.sum() == 2 * 4**3


SETTINGS = tiny_manifest().residual.model_copy(
    update={"threshold": 0.5, "extent_threshold": 0.2, "min_lesion_ml": 0.004}
)


def test_finding_extends_to_the_lower_threshold() -> None:
    anomaly = np.full((5, 5, 12), 0.1, dtype=np.float32)
    anomaly[2, 2, 1:6] = (0.3, 0.4, 0.6, 0.3, 0.15)
    anomaly[2, 2, 8:11] = 0.45  # exceeds only the lower threshold
    labels, count = label_findings(anomaly, SETTINGS, 0.001)
    assert count == 1
    assert np.argwhere(labels).tolist() == [[2, 2, 1], [2, 2, 2], [2, 2, 3], [2, 2, 4]]


def test_labels_are_ranks_by_size() -> None:
    anomaly = np.zeros((5, 5, 20), dtype=np.float32)
    anomaly[0, 0, 0:3] = 0.9  # too small: three voxels of 0.001 ml
    anomaly[0, 0, 5:9] = 0.9
    anomaly[4, 4, 5:11] = 0.6
    labels, count = label_findings(anomaly, SETTINGS, 0.001)
    assert count == 2
    assert (labels[4, 4, 5:11] == 1).all()
    assert (labels[0, 0, 5:9] == 2).all()
    assert (labels > 0).sum() == 10


def test_nan_does_not_connect_findings() -> None:
    anomaly = np.full((1, 1, 9), 0.9, dtype=np.float32)
    anomaly[0, 0, 4] = np.nan
    labels, count = label_findings(anomaly, SETTINGS, 0.001)
    assert count == 2
    assert labels[0, 0, 4] == 0


@pytest.mark.parametrize("seed", range(8))
def test_labels_in_the_box_equal_those_of_the_whole_volume(seed: int) -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((17, 19, 13)), 1.2)
    anomaly = np.asfortranarray(np.maximum(noise, 0).astype(np.float32))
    anomaly[:3] = np.nan
    settings = SETTINGS.model_copy(update={"threshold": 0.2, "extent_threshold": 0.1})
    inside, peaks = anomaly > settings.extent_threshold, anomaly > settings.threshold
    labels, count = ndimage.label(inside, structure=np.ones((3, 3, 3)))
    sizes = ndimage.sum_labels(np.ones(labels.shape), labels, np.arange(1, count + 1))
    kept = [i + 1 for i in np.argsort(-sizes, kind="stable") if sizes[i] >= 4 and peaks[labels == i + 1].any()]
    expected = np.zeros(labels.shape, np.int32)
    for rank, label in enumerate(kept):
        expected[labels == label] = rank + 1
    found, number = label_findings(anomaly, settings, 0.001)
    assert number == len(kept) > 1
    np.testing.assert_array_equal(found, expected)


def test_map_below_the_thresholds_has_no_findings() -> None:
    labels, number = label_findings(np.full((5, 6, 7), 0.1, np.float32), SETTINGS, 0.001)
    assert (labels.shape, labels.dtype, int(labels.sum()), number) == ((5, 6, 7), np.dtype(np.uint16), 0, 0)


def test_dice() -> None:
    a, b = np.array([True, True, False, False]), np.array([True, False, False, False])
    assert dice(a, b) == pytest.approx(2 / 3)
    assert dice(a, ~a) == 0
    assert dice(a & False, a & False) == 1


def test_detection_without_findings_gives_an_empty_mask(manifest: Manifest) -> None:
    volume = brain()
    result = to_scan_result(volume, empty_detection(volume, manifest), manifest)
    assert result.lesions == ()
    assert not result.mask.any()
    np.testing.assert_array_equal(result.counterpart, volume.array)


def test_voxels_that_are_not_analysed_are_nan(manifest: Manifest) -> None:
    volume = brain()
    detection = detection_of_balls(volume, manifest, (LESION_MM, 15.0, 0.4))
    anomaly = detection.anomaly.copy()
    anomaly[26:] = np.nan  # z >= 19.5 mm
    result = to_scan_result(volume, replace(detection, anomaly=anomaly), manifest)
    z = affines.apply_affine(volume.affine, np.moveaxis(np.indices(volume.shape), 0, -1))[..., 2]
    assert np.isnan(result.anomaly[z > 19.5]).all()
    assert not result.mask[z > 19.5].any()
    assert result.mask.any()
    assert np.isnan(result.anomaly[volume.array == 0]).mean() > 0.97  # surface voxels share a pixel with the brain


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("factor", [0.5, 1.35])
def test_counterpart_is_the_scan_without_the_lesion(
    name: str, factor: float, networks: Networks, manifest: Manifest
) -> None:
    healthy = brain(*GRIDS[name])
    sick = with_lesion(healthy, LESION_MM, 15.0, factor)
    detection = detect(sick, networks, manifest)
    result = to_scan_result(sick, detection, manifest)
    changed = detection.slices.grid.to_volume((detection.counterpart != detection.slices.x[:, 0]).astype(np.float32))
    away = ~(changed > 0)  # NaN outside the slices
    np.testing.assert_array_equal(result.counterpart[away], sick.array[away])
    assert away.mean() > 0.85
    heart = ball(healthy, LESION_MM, 9.0)
    before = np.abs(sick.array - healthy.array)[heart].mean()
    after = np.abs(result.counterpart - healthy.array)[heart].mean()
    assert after < 0.35 * before
    # z_500 keeps a fifth of the lesion, and few DDIM steps keep most of that.
    assert result.counterpart[heart].mean() == pytest.approx(healthy.array[heart].mean(), rel=0.18)


def test_counterpart_of_a_clipped_lesion_is_tissue(networks: Networks, manifest: Manifest) -> None:
    healthy = brain()
    sick = with_lesion(healthy, LESION_MM, 15.0, 2.5)
    result = to_scan_result(sick, detect(sick, networks, manifest), manifest)
    heart = ball(healthy, LESION_MM, 9.0)
    assert result.counterpart[heart].mean() == pytest.approx(healthy.array[heart].mean(), rel=0.12)


def test_counterpart_has_the_units_of_the_scan(networks: Networks, manifest: Manifest) -> None:
    sick = with_lesion(brain(), LESION_MM, 15.0, 0.5)
    shifted = Volume(sick.array * np.float32(2.0) - np.float32(1000), sick.affine)
    plain, other = (to_scan_result(v, detect(v, networks, manifest), manifest) for v in (sick, shifted))
    np.testing.assert_array_equal(plain.mask, other.mask)
    np.testing.assert_allclose(other.counterpart, plain.counterpart * 2 - 1000, atol=2.0)
