"""Diffusion steps against closed forms, which exist for a Gaussian prior."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from app.errors import Cancelled, OutOfMemory
from app.manifest import NoiseSchedule
from app.pipeline.diffusion import (
    CLEAN,
    Diffusion,
    KeyedNoise,
    Networks,
    Purpose,
    Schedule,
    inpaint,
    kl_map,
    latent_foreground,
)
from tests.support.oracle import GaussianDenoiser

MEAN, SD = 0.70, 0.50
SCHEDULE = Schedule.linear(1000, 0.0015, 0.0195)
ORACLE = GaussianDenoiser(SCHEDULE, np.array(MEAN), np.array(SD))

LATENT = (3, 8, 6)
NOISE = KeyedNoise(11, LATENT)
SLICES = np.array([4, 9])
DIFFUSION = Diffusion(SCHEDULE, ORACLE, NOISE)
LEVELS = (400, 500, 600)
Z0 = np.random.default_rng(2).normal(MEAN, SD, (2, *LATENT)).astype(np.float32)


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32).reshape(-1, 1, 1, 1)


# ---- noise schedule ----------------------------------------------------------------------------


def test_alpha_bar_is_the_cumulative_product() -> None:
    assert SCHEDULE.alpha_bar[[400, 500, 600]] == pytest.approx([0.128, 0.049, 0.015], abs=5e-4)
    assert SCHEDULE.beta[[0, 999]] == pytest.approx([0.0015, 0.0195])
    assert np.diff(SCHEDULE.beta) == pytest.approx(0.018 / 999)
    assert SCHEDULE.alpha_bar[2] == pytest.approx(
        (1 - SCHEDULE.beta[0]) * (1 - SCHEDULE.beta[1]) * (1 - SCHEDULE.beta[2])
    )
    assert float(SCHEDULE.alpha_bar_at(CLEAN)) == 1.0


def test_schedule_is_made_from_settings() -> None:
    settings = NoiseSchedule(steps=1000, beta_start=0.0015, beta_end=0.0195)
    np.testing.assert_array_equal(Schedule.from_settings(settings).beta, SCHEDULE.beta)


def test_each_image_of_a_batch_has_its_own_time_step() -> None:
    z0, noise = column(1, 1, 1), column(0.5, 0.5, 0.5)
    together = SCHEDULE.diffuse(z0, noise, np.array([10, 500, CLEAN]))
    apart = [SCHEDULE.diffuse(z0[:1], noise[:1], t)[0] for t in (10, 500, CLEAN)]
    np.testing.assert_array_equal(together, np.stack(apart))
    assert together[2, 0, 0, 0] == 1.0
    assert together.dtype == np.float32


def test_diffuse_gives_the_marginal() -> None:
    noise = np.random.default_rng(1).standard_normal((40_000, 1, 1, 1), dtype=np.float32)
    z_t = SCHEDULE.diffuse(np.full_like(noise, 2.0), noise, 500)
    a = SCHEDULE.alpha_bar[500]
    assert z_t.mean() == pytest.approx(2 * np.sqrt(a), abs=0.02)
    assert z_t.std() == pytest.approx(np.sqrt(1 - a), abs=0.02)


@given(st.integers(0, 999), st.floats(-3, 3), st.floats(-3, 3))
def test_predict_z0_inverts_diffuse(t: int, z0: float, epsilon: float) -> None:
    z_t = SCHEDULE.diffuse(column(z0), column(epsilon), t)
    # The float32 rounding of z_t is multiplied by 1 / sqrt(alpha_bar), which is 180 at the last t.
    assert SCHEDULE.predict_z0(z_t, column(epsilon), t).item() == pytest.approx(z0, abs=1e-4)


def posterior(z_t: float, z0: float, t: int) -> tuple[float, float]:
    """Return mean and variance of q(z_{t-1} | z_t, z0) (Ho et al. 2020, eqs. 6 and 7)."""
    beta = SCHEDULE.beta
    before, now = np.prod(1 - beta[:t]), np.prod(1 - beta[: t + 1])
    mean = np.sqrt(before) * beta[t] / (1 - now) * z0 + np.sqrt(1 - beta[t]) * (1 - before) / (1 - now) * z_t
    return mean, (1 - before) / (1 - now) * beta[t]


def gaussian_kl(mean_p: float, var_p: float, mean_q: float, var_q: float) -> float:
    return 0.5 * (float(np.log(var_q / var_p)) + (var_p + (mean_p - mean_q) ** 2) / var_q - 1)


@given(st.integers(1, 999), st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_kl_weight_gives_the_divergence_of_the_posteriors(t: int, z0: float, epsilon: float, predicted: float) -> None:
    a = SCHEDULE.alpha_bar[t]
    z_t = np.sqrt(a) * z0 + np.sqrt(1 - a) * epsilon
    z0_hat = (z_t - np.sqrt(1 - a) * predicted) / np.sqrt(a)
    expected = gaussian_kl(*posterior(z_t, z0, t), *posterior(z_t, z0_hat, t))
    assert SCHEDULE.kl_weight(t) * (epsilon - predicted) ** 2 == pytest.approx(expected, rel=1e-7, abs=1e-10)


@given(st.integers(1, 999), st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_kl_is_half_the_gain_in_signal_to_noise(t: int, z0: float, epsilon: float, predicted: float) -> None:
    """L_{t-1} = 1/2 (SNR_{t-1} - SNR_t) (z0 - z0_hat)^2."""
    before, a = SCHEDULE.alpha_bar[[t - 1, t]]
    z0_hat = z0 + np.sqrt((1 - a) / a) * (epsilon - predicted)
    gain = before / (1 - before) - a / (1 - a)
    assert SCHEDULE.kl_weight(t) * (epsilon - predicted) ** 2 == pytest.approx(
        0.5 * gain * (z0 - z0_hat) ** 2, rel=1e-9, abs=1e-12
    )


def test_kl_weight_is_undefined_at_the_first_step() -> None:
    with pytest.raises(AssertionError):
        SCHEDULE.kl_weight(0)


# ---- DDIM --------------------------------------------------------------------------------------


def ddim_factor(t: int, t_next: int) -> float:
    """Return the factor by which one DDIM step with the exact denoiser multiplies the distance from the mean."""
    a, b = float(SCHEDULE.alpha_bar_at(t)), float(SCHEDULE.alpha_bar_at(t_next))
    return float(np.sqrt(a * b) * SD**2 + np.sqrt((1 - a) * (1 - b))) / (a * SD**2 + 1 - a)


def ddim_moments(times: tuple[int, ...]) -> tuple[float, float]:
    """Return mean and standard deviation at z0 if sampling starts from the true marginal.

    With the exact denoiser each step is linear, z' = gain z + offset. Two values of z give both numbers.
    """
    mean, sd = (float(v) for v in ORACLE.marginal(times[0]))
    for t, t_next in zip(times, (*times[1:], CLEAN), strict=True):
        z = column(0, 1)
        at_zero, at_one = SCHEDULE.ddim_step(z, ORACLE(z, np.full(2, t)), t, t_next).ravel().astype(float)
        mean, sd = (at_one - at_zero) * mean + at_zero, (at_one - at_zero) * sd
    return mean, sd


@pytest.mark.parametrize("times", [(500, 250), (500, 400, 300, 200, 100), tuple(range(500, 0, -10))])
def test_ddim_has_its_closed_form(times: tuple[int, ...]) -> None:
    expected = float(ORACLE.marginal(times[0])[1])
    for t, t_next in zip(times, (*times[1:], CLEAN), strict=True):
        expected *= ddim_factor(t, t_next)
    mean, sd = ddim_moments(times)
    assert mean == pytest.approx(MEAN, abs=1e-5)
    assert sd == pytest.approx(expected, rel=1e-5)


def test_many_ddim_steps_give_the_prior() -> None:
    _, sd = ddim_moments(tuple(range(500, -1, -1)))
    assert sd == pytest.approx(SD, abs=0.005)


def test_ddim_with_the_true_noise_stays_on_the_path() -> None:
    z0, epsilon = column(0.3, -1.2), column(1.1, 0.4)
    z = SCHEDULE.diffuse(z0, epsilon, 800)
    np.testing.assert_allclose(SCHEDULE.ddim_step(z, epsilon, 800, 137), SCHEDULE.diffuse(z0, epsilon, 137), atol=1e-4)
    np.testing.assert_allclose(SCHEDULE.ddim_step(z, epsilon, 800, CLEAN), z0, atol=1e-4)


def test_step_to_the_same_time_is_refused() -> None:
    with pytest.raises(AssertionError):
        SCHEDULE.ddim_step(column(0), column(0), 10, 10)


# ---- keyed noise -------------------------------------------------------------------------------


def test_noise_is_standard_normal() -> None:
    drawn = KeyedNoise(7, (4, 50, 50))(Purpose.KL, np.arange(5), 500)
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 0.01
    assert drawn.dtype == np.float32


def test_noise_of_a_slice_does_not_depend_on_other_slices() -> None:
    noise, slices = KeyedNoise(7, (2, 6, 5)), np.array([3, 10, 4, 0])
    together = noise(Purpose.KL, slices, 500)
    halves = np.concatenate([noise(Purpose.KL, slices[:2], 500), noise(Purpose.KL, slices[2:], 500)])
    np.testing.assert_array_equal(together, halves)
    np.testing.assert_array_equal(together[::-1], noise(Purpose.KL, slices[::-1], 500))
    np.testing.assert_array_equal(together[[2]], noise(Purpose.KL, slices[[2]], 500))


def test_different_keys_give_different_noise() -> None:
    draws = [
        KeyedNoise(seed, (1, 2, 2), view)(purpose, np.array([index]), t).tobytes()
        for seed, purpose, t, index, view in product(
            (0, 1, 2, 3, 2**32, 2**40 + 1), Purpose, (1, 2, 3, 500), (0, 1, 2, 3), (0, 1, 2)
        )
    ]
    assert len(set(draws)) == len(draws)


def test_noise_of_different_keys_is_uncorrelated() -> None:
    large = KeyedNoise(7, (4, 50, 50))
    one = large(Purpose.KL, np.array([0]), 500).ravel()
    others = [
        large(Purpose.KL, np.array([1]), 500),
        large(Purpose.KL, np.array([0]), 501),
        large(Purpose.START, np.array([0]), 500),
        KeyedNoise(8, (4, 50, 50))(Purpose.KL, np.array([0]), 500),
    ]
    for other in others:
        # The standard error of a correlation of 10,000 pairs is 0.01.
        assert np.corrcoef(one, other.ravel())[0, 1] == pytest.approx(0, abs=0.045)


def test_noise_is_that_of_the_first_release() -> None:
    """These values must never change, so that a seed from an old report gives the same mask."""
    drawn = KeyedNoise(7, (1, 1, 3))(Purpose.START, np.array([5]), 500).ravel()
    assert drawn.tolist() == pytest.approx([-0.0698896, 0.6960229, 1.5043923], abs=1e-6)


# ---- KL map ------------------------------------------------------------------------------------


def test_kl_map_has_its_closed_form() -> None:
    """1/2 (SNR_{t-1} - SNR_t) (z0 - E[z0 | z_t])^2, mean over channels and noise levels."""
    expected = np.zeros((2, *LATENT[1:]))
    for t in LEVELS:
        a, before = SCHEDULE.alpha_bar[[t, t - 1]]
        z_t = np.sqrt(a) * Z0 + np.sqrt(1 - a) * NOISE(Purpose.KL, SLICES, t)
        precision = 1 / SD**2 + a / (1 - a)
        z0_hat = (MEAN / SD**2 + np.sqrt(a) / (1 - a) * z_t) / precision  # product of two Gaussians
        gain = before / (1 - before) - a / (1 - a)
        expected += (0.5 * gain * (Z0 - z0_hat) ** 2).mean(axis=1) / len(LEVELS)
    got = kl_map(Z0, SLICES, DIFFUSION, LEVELS)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-9)
    assert got.dtype == np.float32


def test_means_are_over_noise_levels() -> None:
    levels = [kl_map(Z0, SLICES, DIFFUSION, (t,)).astype(np.float64) for t in LEVELS]
    arithmetic = kl_map(Z0, SLICES, DIFFUSION, LEVELS)
    geometric = kl_map(Z0, SLICES, DIFFUSION, LEVELS, "geometric")
    np.testing.assert_allclose(arithmetic, np.mean(levels, axis=0), rtol=1e-5)
    np.testing.assert_allclose(geometric, np.prod(levels, axis=0) ** (1 / 3), rtol=1e-4)
    assert (geometric <= arithmetic * (1 + 1e-6)).all()


def test_kl_is_high_where_a_latent_is_not_from_the_prior() -> None:
    odd = Z0.copy()
    odd[0, :, 2:4, 3:5] += 8 * SD
    plain, kl = kl_map(Z0, SLICES, DIFFUSION, LEVELS), kl_map(odd, SLICES, DIFFUSION, LEVELS)
    changed = np.zeros(kl.shape, dtype=bool)
    changed[0, 2:4, 3:5] = True
    assert kl[changed].min() > 3 * plain.max()
    np.testing.assert_array_equal(kl[~changed], plain[~changed])  # the prior has independent latents


def test_kl_of_a_slice_does_not_depend_on_other_slices() -> None:
    together = kl_map(Z0, SLICES, DIFFUSION, LEVELS)
    np.testing.assert_array_equal(together[1:], kl_map(Z0[1:], SLICES[1:], DIFFUSION, LEVELS))


# ---- latent foreground -------------------------------------------------------------------------


def test_latent_is_foreground_if_half_of_its_pixels_are() -> None:
    pixels = np.zeros((1, 4, 8), dtype=bool)
    pixels[0, :2, :4] = True  # 8 of 16
    pixels[0, 0, 4:8] = True  # 7 of 16, with the next line
    pixels[0, 1, 4:7] = True
    assert latent_foreground(pixels, 4).tolist() == [[[True, False]]]


# ---- inpainting --------------------------------------------------------------------------------

MASK = np.zeros((2, *LATENT[1:]), dtype=bool)
MASK[0, 2:5, 1:4] = True
MASK[1, 6:, 4:] = True
TIMES = (500, 400, 300, 200, 100)


def inpainted(z0: np.ndarray, mask: np.ndarray, slices: np.ndarray = SLICES) -> np.ndarray:
    return inpaint(z0, mask, slices, DIFFUSION, TIMES)


def test_latents_outside_the_mask_equal_z0() -> None:
    m = np.broadcast_to(MASK[:, None], Z0.shape)
    z = inpainted(Z0, MASK)
    assert z.dtype == np.float32
    np.testing.assert_array_equal(z[~m], Z0[~m])
    assert np.abs(z[m] - Z0[m]).min() > 1e-4
    np.testing.assert_array_equal(inpainted(Z0, np.zeros_like(MASK)), Z0)


def test_latents_inside_the_mask_have_the_closed_form_of_ddim() -> None:
    """The prior has independent latents, so those in the mask follow plain DDIM from q(z_500 | z0)."""
    start = SCHEDULE.diffuse(Z0, NOISE(Purpose.START, SLICES, 500), 500).astype(np.float64)
    distance = start - np.sqrt(SCHEDULE.alpha_bar[500]) * MEAN
    for t, t_next in zip(TIMES, (*TIMES[1:], CLEAN), strict=True):
        distance *= ddim_factor(t, t_next)
    m = np.broadcast_to(MASK[:, None], Z0.shape)
    np.testing.assert_allclose(inpainted(Z0, MASK)[m], (MEAN + distance)[m], atol=2e-5)


def test_lesion_inside_the_mask_is_replaced_by_the_prior() -> None:
    sick = Z0.copy()
    sick[0, :, 2:5, 1:4] += 6.0  # 12 standard deviations
    z = inpainted(sick, MASK)[0, :, 2:5, 1:4]
    # z_500 keeps sqrt(.049) = .22 of the shift, and DDIM reduces it further.
    assert abs(z.mean() - MEAN) < 1.0
    everywhere = inpainted(sick, np.ones_like(MASK))[0, :, 2:5, 1:4]
    np.testing.assert_array_equal(z, everywhere)


def predict_mean_of_slice(z_t: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Predict the noise as if every latent of a slice were the mean of that slice."""
    a = SCHEDULE.alpha_bar[t].reshape(-1, 1, 1, 1)
    z0 = (z_t / np.sqrt(a)).mean(axis=(1, 2, 3), keepdims=True)
    return np.asarray((z_t - np.sqrt(a) * z0) / np.sqrt(1 - a), dtype=np.float32)


def test_latents_inside_the_mask_follow_those_outside() -> None:
    z0 = np.full((1, 3, 40, 40), 2.0, dtype=np.float32)
    mask = np.zeros((1, 40, 40), dtype=bool)
    mask[0, 18:22, 18:22] = True
    z0[0, :, 18:22, 18:22] = 30.0
    diffusion = Diffusion(SCHEDULE, predict_mean_of_slice, KeyedNoise(11, (3, 40, 40)))
    z = inpaint(z0, mask, np.array([0]), diffusion, TIMES)
    assert z[0, :, 18:22, 18:22].ravel() == pytest.approx(2.0, abs=0.4)


def test_inpainting_of_a_slice_does_not_depend_on_other_slices() -> None:
    np.testing.assert_array_equal(inpainted(Z0, MASK)[1:], inpainted(Z0[1:], MASK[1:], SLICES[1:]))


# ---- networks in batches -----------------------------------------------------------------------


Z = np.arange(7 * 3 * 2 * 2, dtype=np.float32).reshape(7, 3, 2, 2)


def recording(sizes: list[int]) -> Networks:
    """Return networks that record the sizes of their batches."""

    def network(*arrays: Any) -> Any:
        assert len({len(a) for a in arrays}) == 1
        sizes.append(len(arrays[0]))
        return np.asarray(sum(a.reshape(len(a), -1).sum(axis=1) for a in arrays), dtype=np.float32)

    either: Any = network
    return Networks(either, either, either)


@pytest.mark.parametrize(("size", "expected"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_batches_cover_every_slice_once(size: int, expected: list[int]) -> None:
    sizes: list[int] = []
    reported: list[int] = []
    networks = recording(sizes).in_batches(size, reported.append)
    t = np.full(7, 500)
    np.testing.assert_array_equal(networks.denoise(Z, t), Z.reshape(7, -1).sum(axis=1) + 500)
    assert sizes == reported == expected


def test_all_three_networks_run_in_batches() -> None:
    sizes: list[int] = []
    reported: list[int] = []
    networks = recording(sizes).in_batches(4, reported.append)
    networks.encode(Z)
    networks.denoise(Z, np.full(7, 1))
    networks.decode(Z)
    assert sizes == reported == [4, 3] * 3


def test_callback_that_raises_stops_before_the_next_batch() -> None:
    sizes: list[int] = []

    def cancel(_: int) -> None:
        raise Cancelled("Cancelled.", expected="-", advice="-")

    with pytest.raises(Cancelled):
        recording(sizes).in_batches(2, cancel).encode(Z)
    assert sizes == [2]


@pytest.mark.parametrize("error", [MemoryError(), OutOfMemory("-", expected="-", advice="-")])
def test_batch_is_halved_once_if_memory_runs_out(error: Exception) -> None:
    sizes: list[int] = []
    plain = recording(sizes)

    def limited(*arrays: Any) -> Any:
        if len(arrays[0]) > 2:
            raise error
        return plain.encode(*arrays)

    either: Any = limited
    networks = Networks(either, either, either).in_batches(5, lambda _: None)
    np.testing.assert_array_equal(networks.encode(Z), plain.encode(Z))
    networks.decode(Z)
    assert sizes == [2, 2, 2, 1, 7, 2, 2, 2, 1]
    with pytest.raises(OutOfMemory, match="3 slices"):
        Networks(either, either, either).in_batches(6, lambda _: None).denoise(Z, np.full(7, 1))
