"""The diffusion process: beta, alpha_bar, the posterior, one step of a sampler.

Ho et al. 2020 (DDPM, arXiv 2006.11239) and Song et al. 2021 (DDIM, arXiv 2010.02502); symbols as
there. Time is 0-based, t = 0 ... T-1; `CLEAN` (-1) stands for z0 itself, where alpha_bar is 1.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.volume import FloatArray

Times = int | npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

CLEAN = -1


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels of a diffusion process.

    Attributes
    ----------
    beta : (T,) ndarray
        Variance of the noise added at each step.
    """

    beta: Float64Array

    @classmethod
    def linear(cls, steps: int, beta_start: float, beta_end: float) -> "Schedule":
        """beta linear in t (choice: 0.0015 to 0.0195, the authors' later medical settings)."""
        return cls(np.linspace(beta_start, beta_end, steps, dtype=np.float64))

    @property
    def alpha_bar(self) -> Float64Array:
        """Cumulative product of 1 - beta, (T,): the share of z0's variance left at t."""
        return np.asarray(np.cumprod(1 - self.beta), dtype=np.float64)

    def alpha_bar_at(self, t: Times) -> Float64Array:
        """alpha_bar_t, shaped to multiply (N, C, h, w); 1 at `CLEAN`."""
        with_clean = np.append(self.alpha_bar, 1.0)  # index -1 is CLEAN
        value = np.asarray(with_clean[np.asarray(t)])
        return value.reshape(-1, 1, 1, 1) if value.ndim else value

    def diffuse(self, z0: FloatArray, noise: FloatArray, t: Times) -> FloatArray:
        """z_t ~ q(z_t | z0) for a given standard normal noise, (N, C, h, w)."""
        a = self.alpha_bar_at(t)
        return _single(np.sqrt(a) * z0 + np.sqrt(1 - a) * noise)

    def predict_z0(self, z_t: FloatArray, epsilon: FloatArray, t: Times) -> FloatArray:
        """The z0 that a predicted noise implies (DDPM, eq. 15)."""
        a = self.alpha_bar_at(t)
        return _single((z_t - np.sqrt(1 - a) * epsilon) / np.sqrt(a))

    def kl_weight(self, t: int) -> float:
        """Factor of (epsilon - epsilon_theta)^2 in L_{t-1} with both variances at beta-tilde_t.

        beta_t / (2 alpha_t (1 - alpha_bar_{t-1})): DDPM's eq. 12 with sigma_t^2 = beta-tilde_t.
        Undefined at t = 0, whose posterior has no variance.
        """
        assert t > 0, "the posterior of the first step has no variance"
        beta = float(self.beta[t])
        return beta / (2 * (1 - beta) * (1 - float(self.alpha_bar_at(t - 1))))

    def snr(self, t: Times) -> Float64Array:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar)."""
        a = self.alpha_bar_at(t)
        return a / (1 - a)

    def ddim_step(self, z_t: FloatArray, epsilon: FloatArray, t: int, t_next: int) -> FloatArray:
        """One deterministic step (eta = 0) from t to any earlier t_next (DDIM, eq. 12).

        t_next may be `CLEAN`: the step then returns the predicted z0.
        """
        assert t_next < t, "a reverse step goes to an earlier time"
        return self.diffuse(self.predict_z0(z_t, epsilon, t), epsilon, t_next)

    def ancestral_step(
        self, z_t: FloatArray, epsilon: FloatArray, noise: FloatArray, t: int, t_next: int
    ) -> FloatArray:
        """One draw from p(z_{t_next} | z_t), with the posterior of that very pair of times.

        With t_next = t - 1 it is DDPM's algorithm 2; a strided step needs the pair's own alpha and
        beta, or its variance is wrong.
        """
        assert t_next < t, "a reverse step goes to an earlier time"
        a, a_next = self.alpha_bar_at(t), self.alpha_bar_at(t_next)
        alpha = a / a_next
        z0 = self.predict_z0(z_t, epsilon, t)
        mean = (np.sqrt(a_next) * (1 - alpha) * z0 + np.sqrt(alpha) * (1 - a_next) * z_t) / (1 - a)
        variance = (1 - alpha) * (1 - a_next) / (1 - a)
        return _single(mean + np.sqrt(variance) * noise)


def _single(array: npt.NDArray[np.floating]) -> FloatArray:
    return np.asarray(array, dtype=np.float32)
