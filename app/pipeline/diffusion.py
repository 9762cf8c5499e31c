"""Diffusion model on latents: networks, noise schedule, keyed noise, KL map and inpainting.

The method is that of Pinaya et al. 2022 (arXiv 2206.03461). docs/method.md describes it with its differences. DDPM is
Ho et al. 2020 (arXiv 2006.11239), DDIM is Song et al. 2021 (arXiv 2010.02502). Symbols are those of
these papers. Time steps are 0-based, t = 0 ... T - 1. `CLEAN` (-1) stands for z0 itself, for which alpha_bar is 1. In
shapes, M counts the analysed slices, R the slices that are reversed, and N any number of slices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from app.errors import OutOfMemory
from app.manifest import NoiseSchedule
from app.volume import BoolArray, FloatArray, IntArray

Times = int | IntArray
Float64Array = npt.NDArray[np.float64]
Mean = Literal["arithmetic", "geometric"]

CLEAN = -1

# Called after each batch with the number of slices in it. It may raise `app.errors.Cancelled`.
BatchCallback = Callable[[int], None]


# ---- networks ----------------------------------------------------------------------------------


class Encoder(Protocol):
    """Encoder of the autoencoder."""

    def __call__(self, x: FloatArray) -> FloatArray:
        """Encode slices x (N, 1, H, W) in [0, 1] as latents z0 (N, C, h, w)."""


class Denoiser(Protocol):
    """Denoising U-Net, epsilon_theta."""

    def __call__(self, z_t: FloatArray, t: IntArray) -> FloatArray:
        """Predict the noise (N, C, h, w) in noisy latents z_t (N, C, h, w) at time steps t (N,)."""


class Decoder(Protocol):
    """Decoder of the autoencoder."""

    def __call__(self, z0: FloatArray) -> FloatArray:
        """Decode latents z0 (N, C, h, w) to slices (N, 1, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Networks:
    """Encoder, denoiser and decoder of a bundle: callables on arrays.

    They are onnxruntime sessions in production, torch modules in the evaluation of training, and exact Gaussian models
    in tests.
    """

    encode: Encoder
    denoise: Denoiser
    decode: Decoder

    def in_batches(self, size: int, on_batch: BatchCallback) -> "Networks":
        """Return the same networks, evaluated on at most `size` slices at a time.

        Memory is then bounded by the batch, not by the scan. If memory runs out, the batch size of all three networks
        is halved once. Results do not depend on the batch size, because the noise is keyed by slice.

        Parameters
        ----------
        size : int
            Largest number of slices in one evaluation.
        on_batch : callable
            Called after each batch with the number of slices in it.

        Raises
        ------
        OutOfMemory
            Half of the batch size needs too much memory as well.
        """
        halved = False

        def halve(error: Exception) -> None:
            nonlocal size, halved
            if halved or size == 1:
                raise OutOfMemory(
                    f"A network evaluation of {size} slices needs more memory than there is.",
                    expected="enough memory for one scan (see Sizing in docs/operations.md).",
                    advice="Send the scan again when the machine is less busy, or give the worker more memory.",
                ) from error
            size, halved = size // 2, True

        def batched(network: Callable[..., FloatArray]) -> Callable[..., FloatArray]:
            def call(*arrays: npt.NDArray[np.generic]) -> FloatArray:
                parts: list[FloatArray] = []
                start = 0
                while start < len(arrays[0]):
                    try:
                        parts.append(network(*(a[start : start + size] for a in arrays)))
                    except (OutOfMemory, MemoryError) as error:
                        halve(error)
                        continue
                    start += len(parts[-1])
                    on_batch(len(parts[-1]))
                return np.concatenate(parts)

            return call

        return Networks(batched(self.encode), batched(self.denoise), batched(self.decode))


# ---- noise schedule ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise schedule of a diffusion process (docs/method.md, "Notation").

    Attributes
    ----------
    beta : (T,) ndarray of float64
        Variance of the noise that is added at each step.
    """

    beta: Float64Array

    @classmethod
    def linear(cls, steps: int, beta_start: float, beta_end: float) -> "Schedule":
        """Make a schedule whose beta is linear in t."""
        return cls(np.linspace(beta_start, beta_end, steps, dtype=np.float64))

    @classmethod
    def from_settings(cls, settings: NoiseSchedule) -> "Schedule":
        """Make the schedule of a manifest or of a training configuration."""
        return cls.linear(settings.steps, settings.beta_start, settings.beta_end)

    @property
    def alpha_bar(self) -> Float64Array:
        """Cumulative product of 1 - beta, (T,): the share of the variance of z0 that is left at t."""
        return np.asarray(np.cumprod(1 - self.beta), dtype=np.float64)

    def alpha_bar_at(self, t: Times) -> Float64Array:
        """Return alpha_bar_t, shaped to multiply (N, C, h, w). It is 1 at `CLEAN`."""
        with_clean = np.append(self.alpha_bar, 1.0)  # index -1 is CLEAN
        value = np.asarray(with_clean[np.asarray(t)])
        return value.reshape(-1, 1, 1, 1) if value.ndim else value

    def diffuse(self, z0: FloatArray, noise: FloatArray, t: Times) -> FloatArray:
        """Return z_t ~ q(z_t | z0) for a given standard normal noise, (N, C, h, w) (DDPM, eq. 4)."""
        a = self.alpha_bar_at(t)
        return _to_float32(np.sqrt(a) * z0 + np.sqrt(1 - a) * noise)

    def predict_z0(self, z_t: FloatArray, epsilon: FloatArray, t: Times) -> FloatArray:
        """Return the z0 that a predicted noise implies, (N, C, h, w) (DDPM, eq. 15)."""
        a = self.alpha_bar_at(t)
        return _to_float32((z_t - np.sqrt(1 - a) * epsilon) / np.sqrt(a))

    def kl_weight(self, t: int) -> float:
        """Return the factor of (epsilon - epsilon_theta)^2 in L_{t-1}, both variances fixed to beta-tilde_t.

        It is beta_t / (2 alpha_t (1 - alpha_bar_{t-1})): DDPM, eq. 12 with sigma_t^2 = beta-tilde_t. It is undefined
        at t = 0, because the posterior has no variance there.
        """
        assert t > 0, "the posterior of the first step has no variance"
        beta = float(self.beta[t])
        return beta / (2 * (1 - beta) * (1 - float(self.alpha_bar_at(t - 1))))

    def ddim_step(self, z_t: FloatArray, epsilon: FloatArray, t: int, t_next: int) -> FloatArray:
        """Take one deterministic step (eta = 0) from t to any earlier t_next, (N, C, h, w) (DDIM, eq. 12).

        If t_next is `CLEAN`, return the predicted z0.
        """
        assert t_next < t, "a reverse step goes to an earlier time"
        return self.diffuse(self.predict_z0(z_t, epsilon, t), epsilon, t_next)


# ---- keyed noise -------------------------------------------------------------------------------


class Purpose(IntEnum):
    """Purpose of a draw. It is part of the key, so no two draws share numbers."""

    KL = 1
    START = 2
    KNOWN = 3


PURPOSES = len(Purpose) + 1


@dataclass(frozen=True)
class KeyedNoise:
    """Standard normal noise for latents (docs/method.md, "Reproducible noise").

    Each slice has a separate generator, keyed by (seed, purpose and view, t, slice). Results therefore do not depend
    on which slices are skipped, on the batch size or on its halving.

    Attributes
    ----------
    seed : int
        Seed of the manifest or of the caller.
    shape : tuple of int
        (C, h, w) of the latent of one slice.
    view : int
        Index of the view in the manifest. View 0 is the identity view.
    """

    seed: int
    shape: tuple[int, int, int]
    view: int = 0

    def __call__(self, purpose: Purpose, slices: IntArray, t: int) -> FloatArray:
        """Draw the noise of some slices at one time step.

        Parameters
        ----------
        purpose : Purpose
        slices : (N,) ndarray of int
            Indices of the slices in the stack of the scan.
        t : int

        Returns
        -------
        (N, C, h, w) ndarray of float32
        """
        drawn = np.empty((len(slices), *self.shape), dtype=np.float32)
        for row, index in enumerate(slices):
            # View and purpose share one number. With a fifth number, the key could equal that of a seed that takes
            # two words of 32 bits.
            key = [self.seed, int(purpose) + PURPOSES * self.view, t, int(index)]
            generator = np.random.default_rng(key)
            generator.standard_normal(out=drawn[row], dtype=np.float32)
        return drawn


# ---- encoded view ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diffusion:
    """Diffusion model with the noise of one view of one scan.

    Attributes
    ----------
    schedule : Schedule
    denoise : Denoiser
    noise : KeyedNoise
    """

    schedule: Schedule
    denoise: Denoiser
    noise: KeyedNoise


@dataclass(frozen=True, eq=False)
class EncodedView:
    """Slices of one view and their latents.

    Attributes
    ----------
    x : (M, 1, H, W) ndarray
        Slices in [0, 1].
    foreground : (M, H, W) ndarray of bool
    slice_indices : (M,) ndarray of int
        Indices of the slices in the stack of the scan. They are keys of the noise.
    z0 : (M, C, h, w) ndarray
        Latents.
    foreground_latents : (M, h, w) ndarray of bool
    diffusion : Diffusion
        Diffusion model with the noise of this view.
    """

    x: FloatArray
    foreground: BoolArray
    slice_indices: IntArray
    z0: FloatArray
    foreground_latents: BoolArray
    diffusion: Diffusion


def encode_view(
    x: FloatArray, foreground: BoolArray, slice_indices: IntArray, networks: Networks, diffusion: Diffusion
) -> EncodedView:
    """Encode the slices of one view (docs/method.md, "Notation").

    Parameters
    ----------
    x : (M, 1, H, W) ndarray
    foreground : (M, H, W) ndarray of bool
    slice_indices : (M,) ndarray of int
    networks : Networks
    diffusion : Diffusion
    """
    z0 = networks.encode(x)
    latents = latent_foreground(foreground, x.shape[-1] // z0.shape[-1])
    return EncodedView(x, foreground, slice_indices, z0, latents, diffusion)


def latent_foreground(foreground: BoolArray, downsampling: int) -> BoolArray:
    """Mark the latents of which at least half the pixels are foreground, (N, H, W) -> (N, h, w)."""
    n, height, width = foreground.shape
    f = downsampling
    cells = foreground.reshape(n, height // f, f, width // f, f)
    half: BoolArray = cells.mean(axis=(2, 4)) >= 0.5
    return half


# ---- KL map ------------------------------------------------------------------------------------


def kl_map(
    z0: FloatArray,
    slices: IntArray,
    diffusion: Diffusion,
    timesteps: tuple[int, ...],
    mean: Mean = "arithmetic",
) -> FloatArray:
    """Compute the KL divergence of the true reverse step from the predicted one (docs/method.md, "KL map").

    Pinaya et al. 2022, section 2. The divergence is L_{t-1} = KL(q(z_{t-1} | z_t, z0) || p(z_{t-1} | z_t)),
    DDPM eq. 5. `Schedule.kl_weight` is its factor in closed form, DDPM eq. 12.

    Parameters
    ----------
    z0 : (N, C, h, w) ndarray
        Latents.
    slices : (N,) ndarray of int
        Indices of the slices in the stack: keys of the noise.
    diffusion : Diffusion
    timesteps : tuple of int
        Set S of noise levels. Each takes one evaluation of the denoiser.
    mean : {"arithmetic", "geometric"}
        Mean over S. The factor of L_{t-1} falls by orders of magnitude from small to large t. With the geometric mean
        (ANDi, arXiv 2312.01904) no noise level outweighs the others.

    Returns
    -------
    (N, h, w) ndarray
        Divergence in nats, mean over channels and over S.
    """
    total = np.zeros((len(z0), *z0.shape[2:]), dtype=np.float32)
    transform, inverse = (_safe_log, np.exp) if mean == "geometric" else (np.asarray, np.asarray)
    for t in timesteps:
        epsilon = diffusion.noise(Purpose.KL, slices, t)
        z_t = diffusion.schedule.diffuse(z0, epsilon, t)
        predicted = diffusion.denoise(z_t, np.full(len(z0), t, dtype=np.int64))
        divergence = diffusion.schedule.kl_weight(t) * ((epsilon - predicted) ** 2).mean(axis=1)  # (N, h, w)
        total += transform(divergence)
    return np.asarray(inverse(total / len(timesteps)), dtype=np.float32)


def _safe_log(divergence: FloatArray) -> FloatArray:
    """Return the logarithm. An exact prediction has the divergence 0, which is raised to the smallest float32."""
    return np.asarray(np.log(np.maximum(divergence, np.finfo(np.float32).tiny)), dtype=np.float32)


# ---- inpainting --------------------------------------------------------------------------------


def inpaint(
    z0: FloatArray, mask: BoolArray, slices: IntArray, diffusion: Diffusion, timesteps: tuple[int, ...]
) -> FloatArray:
    """Diffuse latents part of the way and reverse them inside a mask (docs/method.md, "Partial reverse process").

    Pinaya et al. 2022, section 2, with DDIM steps. Outside the mask, each step replaces the latents by z0 at the same
    noise level.

    Parameters
    ----------
    z0 : (N, C, h, w) ndarray
    mask : (N, h, w) ndarray of bool
        True for latents that may change.
    slices : (N,) ndarray of int
        Indices of the slices in the stack: keys of the noise.
    diffusion : Diffusion
    timesteps : tuple of int
        Descending times of a DDIM sub-sequence. The last step goes to z0.

    Returns
    -------
    (N, C, h, w) ndarray
        Latents of the counterpart. Outside the mask they equal z0 bit by bit.
    """
    m = mask[:, None]
    schedule, noise = diffusion.schedule, diffusion.noise
    z = schedule.diffuse(z0, noise(Purpose.START, slices, timesteps[0]), timesteps[0])
    for t, t_next in zip(timesteps, (*timesteps[1:], CLEAN), strict=True):
        predicted = diffusion.denoise(z, np.full(len(z), t, dtype=np.int64))
        inside = schedule.ddim_step(z, predicted, t, t_next)
        outside = z0 if t_next == CLEAN else schedule.diffuse(z0, noise(Purpose.KNOWN, slices, t_next), t_next)
        z = np.where(m, inside, outside)
    return z


def decode_counterpart(
    view: EncodedView, mask: BoolArray, masked_slices: IntArray, networks: Networks, timesteps: tuple[int, ...]
) -> FloatArray:
    """Inpaint the latents of some slices of a view and decode them (docs/method.md, "Partial reverse process").

    Parameters
    ----------
    view : EncodedView
    mask : (M, h, w) ndarray of bool
    masked_slices : (R,) ndarray of int
        Positions of the slices in the view, 0 ... M - 1.
    networks : Networks
    timesteps : tuple of int

    Returns
    -------
    (R, H, W) ndarray
        Healthy counterpart of the slices, in [0, 1].
    """
    counterpart = inpaint(
        view.z0[masked_slices], mask[masked_slices], view.slice_indices[masked_slices], view.diffusion, timesteps
    )
    return networks.decode(counterpart)[:, 0]


def _to_float32(array: npt.NDArray[np.floating]) -> FloatArray:
    return np.asarray(array, dtype=np.float32)
