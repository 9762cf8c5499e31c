"""The paper's algorithm (Pinaya et al. 2022, arXiv 2206.03461) in eager torch, without any optimisation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from app.pipeline.diffusion import CLEAN, Schedule

# z_t (N, C, h, w) and t (N,) -> the predicted noise.
Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Sampler = Literal["ancestral", "ddim"]

KL_TIMES = tuple(range(400, 600))
START = 500


@dataclass(frozen=True)
class Plan:
    """Noise levels at which the denoiser is evaluated.

    Attributes
    ----------
    kl : tuple of int
        Times of the KL map.
    reverse : tuple of int
        Descending times of the reverse process. The last step ends at z0.
    sampler : {"ancestral", "ddim"}
    """

    kl: tuple[int, ...]
    reverse: tuple[int, ...]
    sampler: Sampler

    @property
    def evaluations(self) -> int:
        """Number of denoiser evaluations per slice."""
        return len(self.kl) + len(self.reverse)

    def thin(self, stride: int) -> "Plan":
        """Keep one in `stride` of the noise levels."""
        return Plan(self.kl[::stride], self.reverse[::stride], self.sampler)


ANCESTRAL = Plan(KL_TIMES, tuple(range(START, 0, -1)), "ancestral")
DDIM_50 = Plan(KL_TIMES, tuple(range(START, 0, -10)), "ddim")


@dataclass(frozen=True, eq=False)
class Process:
    """Diffusion model in torch.

    Attributes
    ----------
    schedule : Schedule
    denoise : Denoise
    generator : torch.Generator
        Source of all noise.
    """

    schedule: Schedule
    denoise: Denoise
    generator: torch.Generator

    def predict(self, z: torch.Tensor, t: int) -> torch.Tensor:
        """Predict the noise of a batch at one time."""
        return self.denoise(z, torch.full((len(z),), t, dtype=torch.int64))

    def draw(self, like: torch.Tensor) -> torch.Tensor:
        """Draw standard normal noise of the shape of `like`."""
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)

    def diffuse(self, z0: torch.Tensor, noise: torch.Tensor, t: int) -> torch.Tensor:
        """Return z_t ~ q(z_t | z0) for a given noise."""
        a = float(self.schedule.alpha_bar_at(t))
        z_t: torch.Tensor = math.sqrt(a) * z0 + math.sqrt(1 - a) * noise
        return z_t

    def step(self, z: torch.Tensor, t: int, t_next: int, sampler: Sampler) -> torch.Tensor:
        """Take one reverse step: DDIM with eta = 0, or a draw from the DDPM posterior of this pair of times."""
        a, a_next = float(self.schedule.alpha_bar_at(t)), float(self.schedule.alpha_bar_at(t_next))
        epsilon = self.predict(z, t)
        z0 = (z - (1 - a) ** 0.5 * epsilon) / a**0.5
        if sampler == "ddim":
            return self.diffuse(z0, epsilon, t_next)
        alpha = a / a_next
        mean: torch.Tensor = (a_next**0.5 * (1 - alpha) * z0 + alpha**0.5 * (1 - a_next) * z) / (1 - a)
        variance = (1 - alpha) * (1 - a_next) / (1 - a)
        return mean + math.sqrt(variance) * self.draw(z) if variance else mean


def kl_map(z0: torch.Tensor, process: Process, times: tuple[int, ...]) -> torch.Tensor:
    """Return the KL divergence of the true and the predicted reverse step in nats, mean over channels and times.

    The result is (N, h, w).
    """
    total = torch.zeros((len(z0), *z0.shape[2:]))
    for t in times:
        noise = process.draw(z0)
        predicted = process.predict(process.diffuse(z0, noise, t), t)
        total += process.schedule.kl_weight(t) * ((noise - predicted) ** 2).mean(dim=1)
    return total / len(times)


def inpaint(z0: torch.Tensor, mask: torch.Tensor, process: Process, plan: Plan) -> torch.Tensor:
    """Diffuse to the first time of the plan and reverse, with only the masked latents free to change, (N, C, h, w)."""
    free = mask[:, None]
    z = process.diffuse(z0, process.draw(z0), plan.reverse[0])
    for t, t_next in zip(plan.reverse, (*plan.reverse[1:], CLEAN), strict=True):
        known = z0 if t_next == CLEAN else process.diffuse(z0, process.draw(z0), t_next)
        z = torch.where(free, process.step(z, t, t_next, plan.sampler), known)
    return z
