import numpy as np
import pytest

from app.pipeline.diffusion import Schedule
from tests.support.oracle import GaussianDenoiser

pytest.importorskip("torch")

import torch

from benchmarks import paper

pytestmark = pytest.mark.training

SCHEDULE = Schedule.linear(1000, 0.0015, 0.0195)
MEAN, SD = 0.70, 0.50
ORACLE = GaussianDenoiser(SCHEDULE, np.array(MEAN), np.array(SD))
SHAPE = (4, 3, 40, 40)


def process(seed: int = 0) -> paper.Process:
    def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(ORACLE(z.numpy(), t.numpy()))

    return paper.Process(SCHEDULE, denoise, torch.Generator().manual_seed(seed))


def latents() -> torch.Tensor:
    return MEAN + SD * torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))


def test_plans_have_the_papers_evaluations() -> None:
    assert paper.ANCESTRAL.evaluations == 700
    assert paper.DDIM_50.evaluations == 250
    assert paper.DDIM_50.reverse[:2] == (500, 490)
    assert paper.ANCESTRAL.reverse[-1] == 1


def test_500_ancestral_steps_restore_the_prior() -> None:
    z0 = latents()
    everywhere = torch.ones((4, 40, 40), dtype=torch.bool)
    found = paper.inpaint(z0, everywhere, process(), paper.ANCESTRAL)
    # 19,200 draws: three standard errors are 0.011 (mean) and 0.008 (standard deviation).
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(found.std()) == pytest.approx(SD, abs=0.02)
    # The reverse process is random, so the result differs from the start.
    assert abs(float(torch.corrcoef(torch.stack([found.flatten(), z0.flatten()]))[0, 1])) < 0.5


@pytest.mark.parametrize(("t", "t_next"), [(500, 499), (500, 490), (1, -1), (10, -1)])
def test_steps_equal_ddim_and_the_ddpm_posterior(t: int, t_next: int) -> None:
    z = latents()
    epsilon = ORACLE(z.numpy(), np.full(len(z), t))
    ddim = process().step(z, t, t_next, "ddim").numpy()
    np.testing.assert_allclose(ddim, SCHEDULE.ddim_step(z.numpy(), epsilon, t, t_next), atol=2e-6)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)).numpy()
    ancestral = process(3).step(z, t, t_next, "ancestral").numpy()
    # Mean and variance of the posterior as in Ho et al. 2020, equations 7 and 11, between any two times.
    a, a_next = (float(SCHEDULE.alpha_bar_at(time)) for time in (t, t_next))
    alpha = a / a_next
    mean = (z.numpy() - (1 - alpha) / np.sqrt(1 - a) * epsilon) / np.sqrt(alpha)
    expected = mean + np.sqrt((1 - alpha) * (1 - a_next) / (1 - a)) * noise
    np.testing.assert_allclose(ancestral, expected, atol=2e-6)


def test_unmasked_latents_do_not_change() -> None:
    z0 = latents()
    mask = torch.zeros((4, 40, 40), dtype=torch.bool)
    mask[:, 10:20, 10:20] = True
    found = paper.inpaint(z0, mask, process(), paper.DDIM_50)
    unmasked = ~mask[:, None].expand(SHAPE)
    assert torch.equal(found[unmasked], z0[unmasked])
    assert float((found - z0)[~unmasked].abs().mean()) > 0.05


def test_kl_is_half_the_snr_step_times_the_error_of_z0() -> None:
    t, z0 = 500, latents()
    found = paper.kl_map(z0, process(5), (t,))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5)).numpy()
    z_t = SCHEDULE.diffuse(z0.numpy(), noise, t)
    z0_predicted = SCHEDULE.predict_z0(z_t, ORACLE(z_t, np.full(4, t)), t)
    a, a_next = (float(SCHEDULE.alpha_bar_at(time)) for time in (t, t - 1))
    step = a_next / (1 - a_next) - a / (1 - a)
    expected = 0.5 * step * ((z0.numpy() - z0_predicted) ** 2).mean(axis=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=1e-7)
