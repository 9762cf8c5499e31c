"""The diffusion process against closed forms: for a Gaussian prior everything is known exactly."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.pipeline.diffusion import CLEAN, Schedule
from tests.support.oracle import GaussianDenoiser

MEAN, SD = 0.70, 0.50
SCHEDULE = Schedule.linear(1000, 0.0015, 0.0195)
ORACLE = GaussianDenoiser(SCHEDULE, np.array(MEAN), np.array(SD))
FULL = tuple(range(999, -1, -1))
STRIDED = tuple(range(990, -1, -10))

# A step of a sampler: (z_t, epsilon, noise, t, t_next) -> z_{t_next}.
Step = Callable[[np.ndarray, np.ndarray, np.ndarray, int, int], np.ndarray]


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32).reshape(-1, 1, 1, 1)


def ddim(z: np.ndarray, epsilon: np.ndarray, _: np.ndarray, t: int, t_next: int) -> np.ndarray:
    return SCHEDULE.ddim_step(z, epsilon, t, t_next)


def exact_moments(step: Step, times: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation at z0 of a sampler that starts from the true marginal.

    With the optimal denoiser each step is z' = gain z + offset + spread n: three probes tell the
    three numbers, and the moments follow without drawing a sample.
    """
    mean, sd = (float(v) for v in ORACLE.marginal(times[0]))
    for t, t_next in zip(times, (*times[1:], CLEAN), strict=True):
        z, noise = column(0, 1, 0), column(0, 0, 1)
        at_zero, at_one, with_noise = step(z, ORACLE(z, np.full(3, t)), noise, t, t_next).ravel().astype(float)
        gain, spread = at_one - at_zero, with_noise - at_zero
        mean, sd = gain * mean + at_zero, np.hypot(gain * sd, spread)
    return mean, sd


def test_alpha_bar_is_the_papers_signal() -> None:
    assert SCHEDULE.alpha_bar[[400, 500, 600]] == pytest.approx([0.128, 0.049, 0.015], abs=5e-4)
    assert SCHEDULE.beta[[0, 999]] == pytest.approx([0.0015, 0.0195])
    assert np.diff(SCHEDULE.beta) == pytest.approx(0.018 / 999)
    assert SCHEDULE.alpha_bar[2] == pytest.approx(
        (1 - SCHEDULE.beta[0]) * (1 - SCHEDULE.beta[1]) * (1 - SCHEDULE.beta[2])
    )
    assert float(SCHEDULE.alpha_bar_at(CLEAN)) == 1.0


def test_each_image_of_a_batch_has_its_own_time() -> None:
    z0, noise = column(1, 1, 1), column(0.5, 0.5, 0.5)
    together = SCHEDULE.diffuse(z0, noise, np.array([10, 500, CLEAN]))
    apart = [SCHEDULE.diffuse(z0[:1], noise[:1], t)[0] for t in (10, 500, CLEAN)]
    np.testing.assert_array_equal(together, np.stack(apart))
    assert together[2, 0, 0, 0] == 1.0
    assert together.dtype == np.float32


def test_diffusing_gives_the_marginal() -> None:
    noise = np.random.default_rng(1).standard_normal((40_000, 1, 1, 1), dtype=np.float32)
    z_t = SCHEDULE.diffuse(np.full_like(noise, 2.0), noise, 500)
    a = SCHEDULE.alpha_bar[500]
    assert z_t.mean() == pytest.approx(2 * np.sqrt(a), abs=0.02)
    assert z_t.std() == pytest.approx(np.sqrt(1 - a), abs=0.02)


@given(st.integers(0, 999), st.floats(-3, 3), st.floats(-3, 3))
def test_the_true_noise_gives_back_z0(t: int, z0: float, epsilon: float) -> None:
    z_t = SCHEDULE.diffuse(column(z0), column(epsilon), t)
    # float32 rounding of z_t is magnified by 1 / sqrt(alpha_bar), 180 at the last t.
    assert SCHEDULE.predict_z0(z_t, column(epsilon), t).item() == pytest.approx(z0, abs=1e-4)


# ---- the Kullback-Leibler divergence -----------------------------------------------------------


def posterior(z_t: float, z0: float, t: int) -> tuple[float, float]:
    """Mean and variance of q(z_{t-1} | z_t, z0): Ho et al. 2020, eqs. 6 and 7, written out."""
    beta = SCHEDULE.beta
    before, now = np.prod(1 - beta[:t]), np.prod(1 - beta[: t + 1])
    mean = np.sqrt(before) * beta[t] / (1 - now) * z0 + np.sqrt(1 - beta[t]) * (1 - before) / (1 - now) * z_t
    return mean, (1 - before) / (1 - now) * beta[t]


def gaussian_kl(mean_p: float, var_p: float, mean_q: float, var_q: float) -> float:
    return 0.5 * (float(np.log(var_q / var_p)) + (var_p + (mean_p - mean_q) ** 2) / var_q - 1)


@given(st.integers(1, 999), st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_kl_is_that_of_the_two_posteriors(t: int, z0: float, epsilon: float, predicted: float) -> None:
    a = SCHEDULE.alpha_bar[t]
    z_t = np.sqrt(a) * z0 + np.sqrt(1 - a) * epsilon
    z0_hat = (z_t - np.sqrt(1 - a) * predicted) / np.sqrt(a)
    expected = gaussian_kl(*posterior(z_t, z0, t), *posterior(z_t, z0_hat, t))
    assert SCHEDULE.kl_weight(t) * (epsilon - predicted) ** 2 == pytest.approx(expected, rel=1e-7, abs=1e-10)


@given(st.integers(1, 999), st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_kl_is_half_the_gain_in_signal_to_noise(t: int, z0: float, epsilon: float, predicted: float) -> None:
    """L_{t-1} = 1/2 (SNR_{t-1} - SNR_t) (z0 - z0_hat)^2: METHOD's identity."""
    a = SCHEDULE.alpha_bar[t]
    z0_hat = z0 + np.sqrt((1 - a) / a) * (epsilon - predicted)
    gain = float(SCHEDULE.snr(t - 1) - SCHEDULE.snr(t))
    assert SCHEDULE.kl_weight(t) * (epsilon - predicted) ** 2 == pytest.approx(
        0.5 * gain * (z0 - z0_hat) ** 2, rel=1e-9, abs=1e-12
    )


def test_kl_weight_at_the_first_step_is_refused() -> None:
    with pytest.raises(AssertionError, match="no variance"):
        SCHEDULE.kl_weight(0)


# ---- samplers ----------------------------------------------------------------------------------


@given(st.integers(1, 999), st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_ancestral_step_by_one_is_ddpms_algorithm_2(t: int, z: float, epsilon: float, noise: float) -> None:
    beta, a, before = SCHEDULE.beta[t], SCHEDULE.alpha_bar[t], SCHEDULE.alpha_bar[t - 1]
    expected = (z - beta / np.sqrt(1 - a) * epsilon) / np.sqrt(1 - beta)
    expected += np.sqrt((1 - before) / (1 - a) * beta) * noise
    got = SCHEDULE.ancestral_step(column(z), column(epsilon), column(noise), t, t - 1)
    # predict_z0 is rounded to float32 where 1 / sqrt(alpha_bar) is large, and weighed down again.
    assert got.item() == pytest.approx(expected, abs=2e-5)


@given(st.integers(2, 999), st.data(), st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_strided_ancestral_step_is_the_posterior_of_its_pair(
    t: int, data: st.DataObject, z: float, z0: float, noise: float
) -> None:
    """q(z_s | z_t, z0) by conditioning the joint Gaussian of (z_s, z_t), without DDPM's algebra."""
    s = data.draw(st.integers(0, t - 1))
    a_s, a_t = SCHEDULE.alpha_bar[[s, t]]
    covariance = np.sqrt(a_t / a_s) * (1 - a_s)
    mean = np.sqrt(a_s) * z0 + covariance / (1 - a_t) * (z - np.sqrt(a_t) * z0)
    sd = np.sqrt(1 - a_s - covariance**2 / (1 - a_t))
    epsilon = (z - np.sqrt(a_t) * z0) / np.sqrt(1 - a_t)
    got = SCHEDULE.ancestral_step(column(z), column(epsilon), column(noise), t, s)
    assert got.item() == pytest.approx(mean + sd * noise, abs=2e-4)


def reckoned_sd(times: tuple[int, ...]) -> float:
    """Standard deviation at z0 by conditioning: beta-tilde, and what the best guess of z0 leaves of the prior."""
    variance = float(ORACLE.marginal(times[0])[1]) ** 2
    for t, t_next in zip(times, (*times[1:], CLEAN), strict=True):
        a, b = float(SCHEDULE.alpha_bar_at(t)), float(SCHEDULE.alpha_bar_at(t_next))
        covariance = np.sqrt(a / b) * (1 - b)  # of z_t and z_{t_next}, given z0
        guess = np.sqrt(a) * SD**2 / (a * SD**2 + 1 - a)  # slope of E[z0 | z_t]
        gain = np.sqrt(b) * guess + covariance / (1 - a) * (1 - np.sqrt(a) * guess)
        variance = gain**2 * variance + 1 - b - covariance**2 / (1 - a)
    return float(np.sqrt(variance))


# beta-tilde is the smaller of the two variances that DDPM offers (the true one adds the spread of
# z0 given z_t), so the prior is met from below: .492 with every step, .456 with each tenth.
@pytest.mark.parametrize(("times", "bias"), [(FULL, 0.008), (STRIDED, 0.045)], ids=["1000 steps", "100 steps"])
def test_ancestral_sampling_gives_the_prior(times: tuple[int, ...], bias: float) -> None:
    """A step that always goes to t - 1 gave .18 and .88 here when strided."""
    mean, sd = exact_moments(SCHEDULE.ancestral_step, times)
    assert mean == pytest.approx(MEAN, abs=1e-4)
    assert sd == pytest.approx(reckoned_sd(times), rel=1e-4)
    assert SD - bias <= sd <= SD


def test_drawn_samples_have_the_moments_that_were_reckoned() -> None:
    rng = np.random.default_rng(3)
    mean, sd = (float(v) for v in ORACLE.marginal(STRIDED[0]))
    z = (mean + sd * rng.standard_normal((20_000, 1, 1, 1))).astype(np.float32)
    for t, t_next in zip(STRIDED, (*STRIDED[1:], CLEAN), strict=True):
        noise = rng.standard_normal(z.shape, dtype=np.float32)
        z = SCHEDULE.ancestral_step(z, ORACLE(z, np.full(len(z), t)), noise, t, t_next)
    expected_mean, expected_sd = exact_moments(SCHEDULE.ancestral_step, STRIDED)
    assert z.mean() == pytest.approx(expected_mean, abs=0.015)
    assert z.std() == pytest.approx(expected_sd, abs=0.015)


@pytest.mark.parametrize("times", [(500, 250), (500, 400, 300, 200, 100), tuple(range(500, 0, -10))])
def test_ddim_is_its_own_closed_form(times: tuple[int, ...]) -> None:
    """Few steps do not give the prior; each multiplies the distance from the mean by a known factor."""
    expected = float(ORACLE.marginal(times[0])[1])
    for t, t_next in zip(times, (*times[1:], CLEAN), strict=True):
        a, b = float(SCHEDULE.alpha_bar_at(t)), float(SCHEDULE.alpha_bar_at(t_next))
        expected *= (np.sqrt(a * b) * SD**2 + np.sqrt((1 - a) * (1 - b))) / (a * SD**2 + 1 - a)
    mean, sd = exact_moments(ddim, times)
    assert mean == pytest.approx(MEAN, abs=1e-5)
    assert sd == pytest.approx(expected, rel=1e-5)


def test_many_ddim_steps_follow_the_probability_flow() -> None:
    _, sd = exact_moments(ddim, tuple(range(500, -1, -1)))
    assert sd == pytest.approx(SD, abs=0.005)


def test_ddim_with_the_true_noise_stays_on_the_path() -> None:
    z0, epsilon = column(0.3, -1.2), column(1.1, 0.4)
    z = SCHEDULE.diffuse(z0, epsilon, 800)
    np.testing.assert_allclose(SCHEDULE.ddim_step(z, epsilon, 800, 137), SCHEDULE.diffuse(z0, epsilon, 137), atol=1e-4)
    np.testing.assert_allclose(SCHEDULE.ddim_step(z, epsilon, 800, CLEAN), z0, atol=1e-4)


def test_a_step_forward_in_time_is_refused() -> None:
    z = column(0)
    with pytest.raises(AssertionError, match="earlier"):
        SCHEDULE.ddim_step(z, z, 10, 10)
    with pytest.raises(AssertionError, match="earlier"):
        SCHEDULE.ancestral_step(z, z, z, 10, 20)
