"""Residual, its weighting and filters, and test-time augmentation."""

import numpy as np
import pytest
from scipy import ndimage

from app.manifest import Manifest, View
from app.pipeline.detect import Detection, detect
from app.pipeline.networks import Networks
from app.pipeline.residual import (
    augment,
    average_views,
    erode_foreground,
    invert_augmentation,
    local_contrast,
    masked_residual,
    median_filter,
    upsample,
    weight_residual,
)
from app.volume import Volume
from tests.support.bundle import with_part

RESIDUAL = np.full((1, 8, 8), 0.2, dtype=np.float32)
FLAT = np.full((1, 8, 8), 0.7, dtype=np.float32)


# ---- residual ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 24), (8, 6), (24, 12)])
def test_upsampling_is_bilinear_with_half_pixel_centres(shape: tuple[int, int]) -> None:
    latents = np.random.default_rng(4).random((2, 8, 6)).astype(np.float32)
    zoom = (1, shape[0] / 8, shape[1] / 6)
    expected = ndimage.zoom(latents, zoom, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(upsample(latents, shape), expected, atol=1e-6)


def test_upsampling_by_eight() -> None:
    row = upsample(np.array([[[0.0, 1.0]]]), (1, 8)).ravel()
    assert row.tolist() == pytest.approx([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])


def test_residual_is_the_difference_inside_the_mask() -> None:
    x = np.full((1, 4, 8), 0.7, dtype=np.float32)
    counterpart = np.full((1, 4, 8), 0.9, dtype=np.float32)
    got = masked_residual(x, counterpart, np.array([[[False, True]]]))
    assert got[0, 2].tolist() == pytest.approx([0, 0, 0.025, 0.075, 0.125, 0.175, 0.2, 0.2], abs=1e-6)
    np.testing.assert_array_equal(masked_residual(x, counterpart, np.zeros((1, 1, 2), dtype=bool)), 0)


def test_residual_is_divided_by_local_contrast() -> None:
    assert weight_residual(RESIDUAL, FLAT, 0.0) is RESIDUAL
    np.testing.assert_allclose(weight_residual(RESIDUAL, FLAT, 0.1), 2.0, rtol=1e-2)
    stripes = FLAT.copy()
    stripes[:, :, ::2] = 0.3
    got = weight_residual(RESIDUAL, stripes, 0.1)
    # Two or three of five columns are dark: the standard deviation is 0.4 sqrt(6 / 25).
    np.testing.assert_allclose(got[:, :, 2:-2], 0.2 / (0.1 + 0.4 * np.sqrt(6) / 5), rtol=1e-3)


def test_local_contrast_is_the_standard_deviation_in_a_window_of_the_slice() -> None:
    image = np.random.default_rng(8).random((3, 12, 10)).astype(np.float32)
    contrast = local_contrast(image)
    assert contrast[1, 6, 5] == pytest.approx(image[1, 4:9, 3:8].std(), rel=1e-4)
    np.testing.assert_array_equal(contrast[1:2], local_contrast(image[1:2]))


# ---- post-processing ---------------------------------------------------------------------------


def test_median_removes_specks_and_lines_and_keeps_plateaus() -> None:
    values = np.zeros((2, 12, 12), dtype=np.float32)
    values[0, 2, 2] = 9.0  # a speck
    values[0, :, 9] = 5.0  # a line of one pixel
    values[1, 3:9, 3:9] = 2.0
    got = median_filter(values, 3)
    assert got[0].max() == 0.0
    assert got[1, 4:8, 4:8].min() == 2.0
    assert got.dtype == np.float32
    assert median_filter(values, 1) is values


def test_erosion_removes_the_outermost_pixels_of_each_slice() -> None:
    foreground = np.zeros((2, 9, 9), dtype=bool)
    foreground[0, 2:7, 2:7] = True
    expected = np.zeros_like(foreground)
    expected[0, 3:6, 3:6] = True
    np.testing.assert_array_equal(erode_foreground(foreground, 1), expected)
    assert erode_foreground(foreground, 2).sum() == 1
    assert erode_foreground(foreground, 0) is foreground


def test_eroded_rim_is_not_analysed(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    d = detect(healthy, networks, with_part(manifest, "residual", erosion=2))
    valid = erode_foreground(d.slices.foreground, 2) & d.analysed[:, None, None]
    np.testing.assert_array_equal(np.isfinite(d.anomaly), valid)


def test_weighting_by_intensity_multiplies_by_the_slices(
    volume_with_lesion: Volume, networks: Networks, manifest: Manifest, found: Detection
) -> None:
    weighted = detect(volume_with_lesion, networks, with_part(manifest, "residual", weighted_by_intensity=True))
    assert np.nanmax(found.anomaly) > 0
    np.testing.assert_allclose(weighted.anomaly, found.anomaly * found.slices.x[:, 0], rtol=1e-6)


def test_smoothing_keeps_the_sum_and_lowers_the_peak(
    volume_with_lesion: Volume, networks: Networks, manifest: Manifest, found: Detection
) -> None:
    smooth = detect(volume_with_lesion, networks, with_part(manifest, "residual", smoothing_mm=3.0)).anomaly
    assert np.nanmax(smooth) < np.nanmax(found.anomaly)
    assert np.nansum(smooth) == pytest.approx(np.nansum(found.anomaly), rel=0.05)
    np.testing.assert_array_equal(np.isnan(smooth), np.isnan(found.anomaly))


# ---- test-time augmentation --------------------------------------------------------------------


def test_augmentation_is_inverted_exactly() -> None:
    stack = np.random.default_rng(0).random((3, 6, 8))
    for view in (View(), View(mirrored=True), View(shift=(1, 1)), View(mirrored=True, shift=(2, -3))):
        np.testing.assert_array_equal(invert_augmentation(augment(stack, view), view), stack)
    np.testing.assert_array_equal(augment(stack, View(mirrored=True)), stack[..., ::-1])
    assert augment(stack, View(shift=(1, 0)))[0, 1, 0] == stack[0, 0, 0]


def test_views_are_averaged_in_the_plain_view() -> None:
    stack = np.random.default_rng(0).random((3, 6, 8), dtype=np.float32)
    views = (View(), View(mirrored=True, shift=(2, -3)))
    got = average_views([stack, augment(stack + 1, views[1])], views)
    np.testing.assert_allclose(got, stack + 0.5, rtol=1e-6)
