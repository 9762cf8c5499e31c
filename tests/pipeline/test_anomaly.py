"""Each of the paper's steps, with models whose answers are known exactly."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from app.pipeline import diffusion, residual
from app.pipeline.diffusion import CLEAN, KeyedNoise, Purpose, Schedule
from tests.support.oracle import GaussianDenoiser

SCHEDULE = Schedule.linear(1000, 0.0015, 0.0195)
LATENT = (3, 8, 6)
NOISE = KeyedNoise(11, LATENT)
SLICES = np.array([4, 9])
MEAN, SD = 0.7, 0.5
DIFFUSION = diffusion.Diffusion(SCHEDULE, GaussianDenoiser(SCHEDULE, np.array(MEAN), np.array(SD)), NOISE)
LEVELS = (400, 500, 600)
Z0 = np.random.default_rng(2).normal(MEAN, SD, (2, *LATENT)).astype(np.float32)


def marks(*rows: str) -> np.ndarray:
    """Draw a mask: '#' is True. One slice, (1, h, w)."""
    return np.array([[c == "#" for c in row] for row in rows])[None]


# ---- KL map ------------------------------------------------------------------------------------


def test_kl_map_is_the_mean_of_the_identity() -> None:
    """1/2 (SNR_{t-1} - SNR_t) (z0 - E[z0 | z_t])^2, over channels and noise levels."""
    expected = np.zeros((2, *LATENT[1:]))
    for t in LEVELS:
        a, before = SCHEDULE.alpha_bar[[t, t - 1]]
        z_t = np.sqrt(a) * Z0 + np.sqrt(1 - a) * NOISE(Purpose.KL, SLICES, t)
        precision = 1 / SD**2 + a / (1 - a)
        z0_hat = (MEAN / SD**2 + np.sqrt(a) / (1 - a) * z_t) / precision  # two Gaussians' product
        gain = before / (1 - before) - a / (1 - a)
        expected += (0.5 * gain * (Z0 - z0_hat) ** 2).mean(axis=1) / len(LEVELS)
    got = diffusion.kl_map(Z0, SLICES, DIFFUSION, LEVELS)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-9)
    assert got.dtype == np.float32


def test_geometric_mean_over_noise_levels() -> None:
    one_by_one = [diffusion.kl_map(Z0, SLICES, DIFFUSION, (t,)) for t in LEVELS]
    expected = np.exp(np.mean(np.log(one_by_one), axis=0))
    got = diffusion.kl_map(Z0, SLICES, DIFFUSION, LEVELS, "geometric")
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert (got <= diffusion.kl_map(Z0, SLICES, DIFFUSION, LEVELS) * (1 + 1e-4)).all()


def test_smoothing_keeps_the_mean_of_a_flat_map_and_ignores_the_background() -> None:
    foreground = np.zeros((9, 10, 8), dtype=bool)
    foreground[:, 2:8, 1:7] = True
    flat = np.where(foreground, np.float32(3), np.float32(500))
    smoothed = diffusion.smooth_kl(flat, foreground, (1.5, 0.4, 0.4))
    np.testing.assert_allclose(smoothed[foreground], 3, rtol=1e-5)
    np.testing.assert_array_equal(smoothed[~foreground], 500)

    point = np.zeros((9, 10, 8), dtype=np.float32)
    point[4, 5, 4] = 1
    spread = diffusion.smooth_kl(point, np.ones_like(foreground), (1.0, 0, 0))
    assert spread[4, 5, 4] == pytest.approx(0.399, abs=0.002)  # a normal density at its centre
    assert spread[5, 5, 4] == pytest.approx(0.242, abs=0.002)  # and one standard deviation away
    assert spread[4, 4, 4] == 0
    assert diffusion.smooth_kl(point, foreground, (0, 0, 0)) is point


def test_kl_rises_where_the_latent_is_not_from_the_prior() -> None:
    odd = Z0.copy()
    odd[0, :, 2:4, 3:5] += 8 * SD
    plain = diffusion.kl_map(Z0, SLICES, DIFFUSION, LEVELS)
    kl = diffusion.kl_map(odd, SLICES, DIFFUSION, LEVELS)
    changed = np.zeros(kl.shape, dtype=bool)
    changed[0, 2:4, 3:5] = True
    assert kl[changed].min() > 3 * plain.max()
    np.testing.assert_array_equal(kl[~changed], plain[~changed])  # every latent on its own


def test_a_slice_alone_has_the_kl_it_has_among_others() -> None:
    together = diffusion.kl_map(Z0, SLICES, DIFFUSION, LEVELS)
    alone = diffusion.kl_map(Z0[1:], SLICES[1:], DIFFUSION, LEVELS)
    np.testing.assert_array_equal(together[1:], alone)


def test_the_geometric_mean_is_over_noise_levels() -> None:
    levels = [diffusion.kl_map(Z0, SLICES, DIFFUSION, (t,)).astype(np.float64) for t in LEVELS]
    got = diffusion.kl_map(Z0, SLICES, DIFFUSION, LEVELS, "geometric")
    np.testing.assert_allclose(got, np.prod(levels, axis=0) ** (1 / 3), rtol=1e-4)
    plain = diffusion.kl_map(Z0, SLICES, DIFFUSION, LEVELS)
    np.testing.assert_allclose(plain, np.mean(levels, axis=0), rtol=1e-5)
    assert (got <= plain * (1 + 1e-6)).all()


def test_the_median_takes_specks_and_lines_away_and_leaves_plateaus_in_their_own_slice() -> None:
    values = np.zeros((2, 12, 12), dtype=np.float32)
    values[0, 2, 2] = 9.0  # a speck
    values[0, :, 9] = 5.0  # a line, one pixel wide
    values[1, 3:9, 3:9] = 2.0
    got = residual.median_filter(values, 3)
    assert got[0].max() == 0.0
    assert got[1, 4:8, 4:8].min() == 2.0
    assert got.dtype == np.float32
    assert residual.median_filter(values, 1) is values


def test_smoothing_weighs_foreground_latents_alone() -> None:
    kl = np.full((5, 8, 6), 3.0, dtype=np.float32)
    inside = np.zeros(kl.shape, dtype=bool)
    inside[1:4, 2:7, 1:5] = True
    kl[~inside] = 1000.0
    got = diffusion.smooth_kl(kl, inside, (1.0, 0.7, 0.7))
    np.testing.assert_allclose(got[inside], 3.0, rtol=1e-5)  # no background, and no edge that fades
    np.testing.assert_array_equal(got[~inside], 1000.0)
    kl[2, 4, 3] = 30.0
    got = diffusion.smooth_kl(kl, inside, (1.0, 0.7, 0.7))
    assert 3.5 < got[2, 4, 3] < 15
    assert got[1, 4, 3] > got[1, 2, 1] >= 3.0 - 1e-5  # the neighbouring slice is told
    assert diffusion.smooth_kl(kl, inside, (0.0, 0.0, 0.0)) is kl


# ---- latent mask -------------------------------------------------------------------------------


def test_a_latent_is_foreground_from_half_of_its_pixels() -> None:
    pixels = np.zeros((1, 4, 8), dtype=bool)
    pixels[0, :2, :4] = True  # 8 of 16
    pixels[0, 0, 4:8] = True  # 7 of 16, with the next line
    pixels[0, 1, 4:7] = True
    assert diffusion.latent_foreground(pixels, 4).tolist() == [[[True, False]]]


def test_mask_is_strictly_above_the_threshold_and_inside() -> None:
    kl = np.array([[[1.0, 2.0, 3.0], [3.0, 3.0, 0.0]]], dtype=np.float32)
    inside = np.array([[[True, True, True], [False, True, True]]])
    mask = diffusion.latent_mask(kl, inside, threshold=2.0, min_component=1, grow=0)
    assert mask.tolist() == [[[False, False, True], [False, True, False]]]


def test_small_components_are_dropped_and_corners_join() -> None:
    kl = marks(
        "#....#",
        ".#....",
        "..#..#",
        "......",
        "##..#.",
    ).astype(np.float32)
    mask = diffusion.latent_mask(kl, np.ones(kl.shape, dtype=bool), 0.5, min_component=3, grow=0)
    expected = marks(
        "#.....",
        ".#....",
        "..#...",
        "......",
        "......",
    )
    np.testing.assert_array_equal(mask, expected)


def test_components_do_not_join_across_slices() -> None:
    kl = np.zeros((2, 3, 3), dtype=np.float32)
    kl[:, 1, 1] = 1
    mask = diffusion.latent_mask(kl, np.ones(kl.shape, dtype=bool), 0.5, min_component=2, grow=1)
    assert not mask.any()


def test_growing_stays_in_the_foreground() -> None:
    kl = marks(".....", ".....", "..#..", ".....", ".....").astype(np.float32)
    inside = np.ones(kl.shape, dtype=bool)
    inside[0, :, 3:] = False
    one = diffusion.latent_mask(kl, inside, 0.5, min_component=1, grow=1)
    np.testing.assert_array_equal(one, marks(".....", ".##..", ".##..", ".##..", "....."))
    two = diffusion.latent_mask(kl, inside, 0.5, min_component=1, grow=2)
    np.testing.assert_array_equal(two, marks(*["###.."] * 5))


@given(hnp.arrays(np.float32, (2, 6, 5), elements=st.floats(0, 1, width=32)), st.integers(1, 5), st.integers(0, 2))
def test_mask_properties(kl: np.ndarray, min_component: int, grow: int) -> None:
    inside = np.zeros(kl.shape, dtype=bool)
    inside[:, 1:, :4] = True
    before = kl.copy()
    mask = diffusion.latent_mask(kl, inside, 0.6, min_component, grow)
    np.testing.assert_array_equal(kl, before)  # the caller's map is left alone
    assert not mask[~inside].any()
    higher = diffusion.latent_mask(kl, inside, 0.8, min_component, grow)
    assert not (higher & ~mask).any()  # a higher threshold marks less
    for one in mask:
        labels, count = ndimage.label(one, structure=np.ones((3, 3)))
        assert all((labels == i).sum() >= min_component for i in range(1, count + 1))


# ---- inpainting --------------------------------------------------------------------------------

MASK = np.zeros((2, *LATENT[1:]), dtype=bool)
MASK[0, 2:5, 1:4] = True
MASK[1, 6:, 4:] = True
TIMES = (500, 400, 300, 200, 100)


def inpaint(z0: np.ndarray, mask: np.ndarray, slices: np.ndarray = SLICES) -> np.ndarray:
    return diffusion.inpaint(z0, mask, slices, DIFFUSION, TIMES)


def test_known_latents_come_back_bit_for_bit() -> None:
    m = np.broadcast_to(MASK[:, None], Z0.shape)
    z = inpaint(Z0, MASK)
    assert z.dtype == np.float32
    np.testing.assert_array_equal(z[~m], Z0[~m])
    assert np.abs(z[m] - Z0[m]).min() > 1e-4
    np.testing.assert_array_equal(inpaint(Z0, np.zeros_like(MASK)), Z0)


def test_masked_latents_are_the_closed_form_of_ddim() -> None:
    """Latents of this prior do not see each other: the masked ones are a plain DDIM from q(z_500 | z0)."""
    start = SCHEDULE.diffuse(Z0, NOISE(Purpose.START, SLICES, 500), 500).astype(np.float64)
    distance = start - np.sqrt(SCHEDULE.alpha_bar[500]) * MEAN
    for t, t_next in zip(TIMES, (*TIMES[1:], CLEAN), strict=True):
        a, b = float(SCHEDULE.alpha_bar_at(t)), float(SCHEDULE.alpha_bar_at(t_next))
        distance *= (np.sqrt(a * b) * SD**2 + np.sqrt((1 - a) * (1 - b))) / (a * SD**2 + 1 - a)
    m = np.broadcast_to(MASK[:, None], Z0.shape)
    np.testing.assert_allclose(inpaint(Z0, MASK)[m], (MEAN + distance)[m], atol=2e-5)


def test_a_lesion_in_the_mask_is_replaced_by_the_prior() -> None:
    sick = Z0.copy()
    sick[0, :, 2:5, 1:4] += 6.0  # 12 standard deviations
    z = inpaint(sick, MASK)[0, :, 2:5, 1:4]
    # z_500 keeps sqrt(.049) = .22 of the shift, and DDIM's contraction little of that.
    assert abs(z.mean() - MEAN) < 1.0
    everywhere = inpaint(sick, np.ones_like(MASK))[0, :, 2:5, 1:4]
    np.testing.assert_array_equal(z, everywhere)


class FromNeighbours:
    """A denoiser that predicts every latent of a slice to be the mean of that slice."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, z_t: np.ndarray, t: np.ndarray) -> np.ndarray:
        a = self.schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
        z0 = (z_t / np.sqrt(a)).mean(axis=(1, 2, 3), keepdims=True)
        return np.asarray((z_t - np.sqrt(a) * z0) / np.sqrt(1 - a), dtype=np.float32)


def test_masked_latents_follow_the_known_ones() -> None:
    """With known parts at 2, a model that looks around fills in 2, whatever the mask hid."""
    large = KeyedNoise(11, (3, 40, 40))
    z0 = np.full((1, 3, 40, 40), 2.0, dtype=np.float32)
    mask = np.zeros((1, 40, 40), dtype=bool)
    mask[0, 18:22, 18:22] = True
    z0[0, :, 18:22, 18:22] = 30.0
    diffusion = diffusion.Diffusion(SCHEDULE, FromNeighbours(SCHEDULE), large)
    z = diffusion.inpaint(z0, mask, np.array([0]), diffusion, TIMES)
    assert z[0, :, 18:22, 18:22].ravel() == pytest.approx(2.0, abs=0.4)


def test_a_slice_alone_is_reversed_as_it_is_among_others() -> None:
    np.testing.assert_array_equal(inpaint(Z0, MASK)[1:], inpaint(Z0[1:], MASK[1:], SLICES[1:]))


# ---- residual and score ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 24), (8, 6), (24, 12)])
def test_upsampling_is_bilinear_with_half_pixel_centres(shape: tuple[int, int]) -> None:
    latents = np.random.default_rng(4).random((2, 8, 6)).astype(np.float32)
    zoom = (1, shape[0] / 8, shape[1] / 6)
    expected = ndimage.zoom(latents, zoom, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(residual.upsample(latents, shape), expected, atol=1e-6)


def test_upsampling_written_out() -> None:
    row = residual.upsample(np.array([[[0.0, 1.0]]]), (1, 8)).ravel()
    assert row.tolist() == pytest.approx([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])


def test_residual_is_the_difference_under_the_mask() -> None:
    reference = np.full((1, 4, 8), 0.7, dtype=np.float32)
    counterpart = np.full((1, 4, 8), 0.9, dtype=np.float32)
    got = residual.masked_residual(reference, counterpart, np.array([[[False, True]]]))
    assert got[0, 2].tolist() == pytest.approx([0, 0, 0.025, 0.075, 0.125, 0.175, 0.2, 0.2], abs=1e-6)
    np.testing.assert_array_equal(residual.masked_residual(reference, counterpart, np.zeros((1, 1, 2), dtype=bool)), 0)


def test_score_is_the_mean_of_the_foreground() -> None:
    kl = np.array([[[1.0, 2.0], [4.0, np.nan]]], dtype=np.float32)
    assert diffusion.score(kl, np.array([[[True, False], [True, False]]])) == pytest.approx(2.5)
