"""Comparison of a scan with healthy ones: out-of-distribution check, residual, augmentation, latent mask."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from app.errors import OutOfDistribution
from app.manifest import Manifest, Range, View
from app.pipeline.detect import Detection, detect
from app.pipeline.diffusion import Diffusion, EncodedView, KeyedNoise, Networks, Schedule
from app.pipeline.scores import (
    SAMPLED_SLICES,
    augment,
    average_views,
    check_white_matter,
    erode_foreground,
    invert_augmentation,
    latent_mask,
    local_contrast,
    masked_residual,
    median_filter,
    median_kl_ranges,
    outlier_slice_fraction,
    smooth_kl,
    solidities,
    upsample,
    weight_residual,
    white_matter_contrast,
)
from app.volume import BoolArray, FloatArray, Volume
from tests.support.bundle import with_part
from tests.support.oracle import GaussianDenoiser
from tests.support.phantom import with_lesion

# ---- out-of-distribution check -----------------------------------------------------------------


@pytest.mark.parametrize("side", ["low", "high"])
def test_reconstruction_error_is_checked_on_both_sides(
    healthy: Volume, networks: Networks, manifest: Manifest, side: str
) -> None:
    value = detect(healthy, networks, manifest).scores.reconstruction
    around = Range(low=value * 0.99, high=value * 1.01)
    detect(healthy, networks, with_part(manifest, "ood", reconstruction_range=around))
    beyond = Range(low=value * 1.01, high=1.0) if side == "low" else Range(low=0.0, high=value * 0.99)
    with pytest.raises(OutOfDistribution, match=f"reconstruction error is {value:.3g}"):
        detect(healthy, networks, with_part(manifest, "ood", reconstruction_range=beyond))


def test_range_of_the_median_kl_must_overlap_the_healthy_range(
    healthy: Volume, networks: Networks, manifest: Manifest
) -> None:
    smallest, largest = detect(healthy, networks, manifest).scores.median_kl_range[0]
    assert smallest < 0.9 * largest
    for low, high in ((largest * 0.99, 1.0), (0.0, smallest * 1.01)):
        detect(healthy, networks, with_part(manifest, "ood", median_kl_range=(Range(low=low, high=high),)))
    for low, high in ((largest * 1.01, 1.0), (0.0, smallest * 0.99)):
        with pytest.raises(OutOfDistribution, match=f"median KL .* t = 500 is {smallest:.3g} to {largest:.3g}"):
            detect(healthy, networks, with_part(manifest, "ood", median_kl_range=(Range(low=low, high=high),)))


def test_large_fraction_of_outlier_latents_is_refused(
    healthy: Volume, volume_with_lesion: Volume, networks: Networks, manifest: Manifest
) -> None:
    largest = np.nanmax(detect(healthy, networks, manifest).kl)
    strict = with_part(manifest, "ood", latent_kl_range=Range(low=0.0, high=float(largest)), max_outlier_fraction=0.1)
    assert 0 < detect(volume_with_lesion, networks, strict).scores.outlier_fraction < 0.1
    huge = with_lesion(healthy, (0.0, 0.0, 0.0), 55.0, 0.45)
    with pytest.raises(OutOfDistribution, match="of its latents"):
        detect(huge, networks, strict)


def test_large_fraction_of_outlier_slices_is_refused(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    slices = detect(healthy, networks, manifest).scores.slices
    odd = with_part(manifest, "calibration", slice_score=Range(low=0.0, high=float(np.quantile(slices, 0.4))))
    assert outlier_slice_fraction(slices, odd.calibration.slice_score) == pytest.approx(0.6, abs=0.03)
    detect(healthy, networks, odd)  # max_outlier_slice_fraction is not set
    detect(healthy, networks, with_part(odd, "ood", max_outlier_slice_fraction=0.7))
    with pytest.raises(OutOfDistribution, match="of its slices have a mean KL"):
        detect(healthy, networks, with_part(odd, "ood", max_outlier_slice_fraction=0.5))


def test_outline_with_deep_gaps_is_refused(networks: Networks, manifest: Manifest) -> None:
    """A disc is convex. The bars of a grid with gaps, as of fingers, fill a part of their hull."""
    rows, columns = np.mgrid[-60:60, -60:60]
    disc = (rows**2 + columns**2 < 55**2).astype(np.float32)
    gaps = disc * ((columns % 20 < 8) | (rows < -20))
    affine = np.diag([1.5, 1.5, 2.0, 1.0])
    strict = with_part(manifest, "ood", min_solidity=0.8)

    def scan(image: FloatArray) -> Volume:
        return Volume(np.repeat(image[:, :, None], 20, axis=2), affine)

    detect(scan(disc), networks, strict)
    missing = scan(disc)
    missing.array[:, :, 8:12] = 0  # no foreground in the middle slices
    detect(missing, networks, strict)
    with pytest.raises(OutOfDistribution, match=r"fills \d\d% of its convex hull, at least 80% are accepted"):
        detect(scan(gaps), networks, strict)


def brain_phantom(white: float, grey: float, fluid: float) -> tuple[FloatArray, BoolArray]:
    """Return slices (20, 96, 80) of 2 mm: a ventricle, a core of white matter, and folds of grey matter around it."""
    z, rows, columns = np.mgrid[-20:20:2, -96:96:2, -80:80:2]
    radius = np.sqrt((rows / 1.2) ** 2 + columns**2 + z**2)
    rng = np.random.default_rng(0)
    folds = np.where(rng.random(radius.shape) < 0.8, grey, white)
    x = np.where(radius < 36, white, folds) + rng.normal(0, 0.005, radius.shape)
    x = np.where(radius < 15, fluid, x)
    foreground = radius < 70
    return np.where(foreground, x, 0).astype(np.float32), foreground


def test_white_matter_contrast_is_above_one_only_in_t1() -> None:
    spacing = (2.0, 2.0, 2.0)
    t1 = white_matter_contrast(*brain_phantom(white=0.7, grey=0.5, fluid=0.15), spacing)
    weak = white_matter_contrast(*brain_phantom(white=0.7, grey=0.62, fluid=0.3), spacing)
    flair = white_matter_contrast(*brain_phantom(white=0.55, grey=0.62, fluid=0.1), spacing)
    t2 = white_matter_contrast(*brain_phantom(white=0.4, grey=0.55, fluid=0.75), spacing)
    assert t1 > weak > 1.04
    assert flair < 1
    assert t2 < 1


def test_cavity_does_not_change_the_white_matter_contrast() -> None:
    """A resection is filled with fluid: it is smooth, but it is not white matter."""
    x, foreground = brain_phantom(white=0.7, grey=0.5, fluid=0.15)
    whole = white_matter_contrast(x, foreground, (2.0, 2.0, 2.0))
    x[4:16, 20:40, 30:60] = 0.15
    assert white_matter_contrast(x, foreground, (2.0, 2.0, 2.0)) == pytest.approx(whole, abs=0.05)


def test_thin_foreground_has_no_white_matter_contrast() -> None:
    x = np.zeros((3, 20, 20), np.float32)
    x[:, 9:11] = 0.5
    assert np.isnan(white_matter_contrast(x, x > 0, (2.0, 2.0, 2.0)))


def test_scan_without_bright_white_matter_is_refused(manifest: Manifest) -> None:
    strict = with_part(manifest, "ood", min_white_matter_contrast=1.04).ood
    spacing = (2.0, 2.0, 2.0)
    check_white_matter(*brain_phantom(white=0.7, grey=0.5, fluid=0.15), strict, spacing)
    flair = brain_phantom(white=0.55, grey=0.62, fluid=0.1)
    with pytest.raises(OutOfDistribution, match=r"White matter has 0\.\d\d times") as caught:
        check_white_matter(*flair, strict, spacing)
    assert "T1-weighted series" in caught.value.advice
    check_white_matter(*flair, manifest.ood, spacing)  # not set: not checked


def test_solidity_is_that_of_plane_geometry() -> None:
    masks = np.zeros((4, 20, 20), np.bool_)
    masks[0, 5:10, 5:15] = True
    masks[1] = masks[0]
    masks[1, 7:9, 7:9] = False  # a ventricle is no gap of the outline
    masks[2, 2:18, 2:5] = masks[2, 2:5, 2:18] = True  # 87 pixels in a hull of 256 - 13 * 13 / 2
    np.testing.assert_allclose(solidities(masks), [1, 1, 87 / 171.5, np.nan], rtol=1e-6)


def test_slice_without_a_score_is_an_outlier() -> None:
    assert outlier_slice_fraction(np.array([0.1, np.nan], np.float32), Range(low=0, high=1)) == 0.5


def test_scan_of_few_slices_is_checked_slice_by_slice(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    """The range over the slices of a stack does not apply to a single slice."""
    smallest, largest = detect(healthy, networks, manifest).scores.median_kl_range[0]
    never = with_part(manifest, "ood", median_kl_range=(Range(low=largest * 2, high=largest * 3),))
    middle = healthy.array.shape[2] // 2
    few = Volume(healthy.array[:, :, middle : middle + 1], healthy.affine)
    scores = detect(few, networks, manifest).scores
    assert len(scores.slices) < SAMPLED_SLICES
    assert smallest / 2 < scores.median_kl_range[0][0] < largest * 2
    with pytest.raises(OutOfDistribution, match="median KL"):
        detect(few, networks, never)  # without a check of slices, the range is checked
    own = Range(low=0.9 * float(scores.slices.min()), high=1.1 * float(scores.slices.max()))
    by_slice = with_part(with_part(never, "ood", max_outlier_slice_fraction=0.5), "calibration", slice_score=own)
    detect(few, networks, by_slice)
    with pytest.raises(OutOfDistribution, match="median KL"):
        detect(healthy, networks, by_slice)  # enough slices: both are checked
    higher = with_part(by_slice, "calibration", slice_score=Range(low=2 * own.high, high=3 * own.high))
    with pytest.raises(OutOfDistribution, match="100% of its slices") as caught:
        detect(few, networks, higher)
    assert "whole series" in caught.value.advice


def test_median_kl_range_is_over_slices() -> None:
    schedule = Schedule.linear(1000, 0.0015, 0.0195)
    z0 = np.random.default_rng(2).standard_normal((4, 1, 8, 8), dtype=np.float32)
    diffusion = Diffusion(schedule, GaussianDenoiser(schedule, np.zeros(1), np.ones(1)), KeyedNoise(7, (1, 8, 8)))
    inside = np.ones((4, 8, 8), dtype=bool)

    def ranges(latents: FloatArray, of: slice = slice(0, 4)) -> tuple[float, float]:
        indices = np.arange(4)[of]
        view = EncodedView(latents[of], inside[of], indices, latents[of], inside[of], diffusion)
        return median_kl_ranges(view, (100,))[0]

    each = [ranges(z0, slice(i, i + 1)) for i in range(4)]
    assert all(smallest == largest for smallest, largest in each)
    assert ranges(z0) == pytest.approx((min(each)[0], max(each)[0]))
    diseased = z0.copy()
    diseased[np.argmax(each, axis=0)[0]] += 5
    assert ranges(diseased)[0] == pytest.approx(min(each)[0])
    assert ranges(z0 + np.float32(5))[0] > 5 * min(each)[0]


def test_network_that_returns_nan_is_refused(healthy: Volume, networks: Networks, manifest: Manifest) -> None:
    def nan(z_t: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.asarray(z_t * np.nan * t[0], dtype=np.float32)

    with pytest.raises(OutOfDistribution, match="nan to nan"):
        detect(healthy, Networks(networks.encode, nan, networks.decode), manifest)


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
