"""Interface of the three networks of a bundle: callables on arrays.

They are onnxruntime sessions in production, torch modules in the evaluation of training, and exact Gaussian models in
tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from app.errors import OutOfMemory
from app.volume import FloatArray, IntArray

# Called after each batch with the number of slices in it. It may raise `app.errors.Cancelled`.
BatchCallback = Callable[[int], None]


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
    """Encoder, denoiser and decoder of a bundle."""

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
