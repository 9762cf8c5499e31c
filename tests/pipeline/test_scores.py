"""Tests of the residual, the test-time augmentation and the latent mask."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from app.manifest import Manifest, View
from app.pipeline.detect import Detection, detect
from app.pipeline.diffusion import Networks
from app.pipeline.scores import (
    augment,
    average_views,
    erode_foreground,
    invert_augmentation,
    latent_mask,
    local_contrast,
    masked_residual,
    median_filter,
    smooth_kl,
    upsample,
    weight_residual,
)
from app.volume import Volume
from tests.support.bundle import with_part

# ---- residual ----------------------------------------------------------------------------------

RESIDUAL = np.full((1, 8, 8), 0.2, dtype=np.float32)
FLAT = np.full((1, 8, 8), 0.7, dtype=np.float32)


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


# ---- KL map and latent mask --------------------------------------------------------------------


def draw(*rows: str) -> np.ndarray:
    """Return a mask of one slice, (1, h, w). '#' is True."""
    return np.array([[c == "#" for c in row] for row in rows])[None]


def test_smoothing_is_gaussian() -> None:
    point, everywhere = np.zeros((9, 10, 8), dtype=np.float32), np.ones((9, 10, 8), dtype=bool)
    point[4, 5, 4] = 1
    spread = smooth_kl(point, everywhere, (1.0, 0, 0))
    assert spread[4, 5, 4] == pytest.approx(0.399, abs=0.002)  # normal density at 0
    assert spread[5, 5, 4] == pytest.approx(0.242, abs=0.002)  # and at one standard deviation
    assert spread[4, 4, 4] == 0
    assert smooth_kl(point, everywhere, (0, 0, 0)) is point


def test_smoothing_ignores_the_background() -> None:
    kl = np.full((5, 8, 6), 3.0, dtype=np.float32)
    inside = np.zeros(kl.shape, dtype=bool)
    inside[1:4, 2:7, 1:5] = True
    kl[~inside] = 1000.0
    got = smooth_kl(kl, inside, (1.0, 0.7, 0.7))
    np.testing.assert_allclose(got[inside], 3.0, rtol=1e-5)
    np.testing.assert_array_equal(got[~inside], 1000.0)
    kl[2, 4, 3] = 30.0
    got = smooth_kl(kl, inside, (1.0, 0.7, 0.7))
    assert 3.5 < got[2, 4, 3] < 15
    assert got[1, 4, 3] > got[1, 2, 1] >= 3.0 - 1e-5  # it reaches the neighbouring slice


def test_mask_is_strictly_above_the_threshold_and_inside_the_foreground() -> None:
    kl = np.array([[[1.0, 2.0, 3.0], [3.0, 3.0, 0.0]]], dtype=np.float32)
    inside = np.array([[[True, True, True], [False, True, True]]])
    mask = latent_mask(kl, inside, threshold=2.0, min_component=1, grow=0)
    assert mask.tolist() == [[[False, False, True], [False, True, False]]]


def test_small_components_are_dropped_with_8_connectivity() -> None:
    kl = draw(
        "#....#",
        ".#....",
        "..#..#",
        "......",
        "##..#.",
    ).astype(np.float32)
    mask = latent_mask(kl, np.ones(kl.shape, dtype=bool), 0.5, min_component=3, grow=0)
    expected = draw(
        "#.....",
        ".#....",
        "..#...",
        "......",
        "......",
    )
    np.testing.assert_array_equal(mask, expected)


def test_components_do_not_span_slices() -> None:
    kl = np.zeros((2, 3, 3), dtype=np.float32)
    kl[:, 1, 1] = 1
    mask = latent_mask(kl, np.ones(kl.shape, dtype=bool), 0.5, min_component=2, grow=1)
    assert not mask.any()


def test_dilation_stays_in_the_foreground() -> None:
    kl = draw(".....", ".....", "..#..", ".....", ".....").astype(np.float32)
    inside = np.ones(kl.shape, dtype=bool)
    inside[0, :, 3:] = False
    one = latent_mask(kl, inside, 0.5, min_component=1, grow=1)
    np.testing.assert_array_equal(one, draw(".....", ".##..", ".##..", ".##..", "....."))
    two = latent_mask(kl, inside, 0.5, min_component=1, grow=2)
    np.testing.assert_array_equal(two, draw(*["###.."] * 5))


@given(hnp.arrays(np.float32, (2, 6, 5), elements=st.floats(0, 1, width=32)), st.integers(1, 5), st.integers(0, 2))
def test_mask_properties(kl: np.ndarray, min_component: int, grow: int) -> None:
    inside = np.zeros(kl.shape, dtype=bool)
    inside[:, 1:, :4] = True
    before = kl.copy()
    mask = latent_mask(kl, inside, 0.6, min_component, grow)
    np.testing.assert_array_equal(kl, before)
    assert not mask[~inside].any()
    higher = latent_mask(kl, inside, 0.8, min_component, grow)
    assert not (higher & ~mask).any()
    for one in mask:
        labels, count = ndimage.label(one, structure=np.ones((3, 3)))
        assert all((labels == i).sum() >= min_component for i in range(1, count + 1))
