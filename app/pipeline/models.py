"""What the pipeline needs of a model: three callables on arrays.

onnxruntime in production, torch in training's evaluation, an exact Gaussian oracle in tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from app.errors import OutOfMemory
from app.volume import FloatArray

IntArray = npt.NDArray[np.int64]
# Called between network evaluations with how many slices were just evaluated. It may raise
# `app.errors.Cancelled` to stop.
Tick = Callable[[int], None]


class Encode(Protocol):
    def __call__(self, x: FloatArray) -> FloatArray:
        """(N, 1, H, W) in [0, 1] -> z0 (N, C, h, w)."""


class Denoise(Protocol):
    def __call__(self, z_t: FloatArray, t: IntArray) -> FloatArray:
        """(N, C, h, w) and (N,) -> the predicted noise, (N, C, h, w)."""


class Decode(Protocol):
    def __call__(self, z0: FloatArray) -> FloatArray:
        """(N, C, h, w) -> (N, 1, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Models:
    """The three networks of a bundle."""

    encode: Encode
    denoise: Denoise
    decode: Decode

    def in_batches(self, size: int, tick: Tick) -> "Models":
        """The same models, evaluated `size` slices at a time, with a tick after each batch.

        Each network sees every batch alike, so memory is bounded by the batch and not by the scan.
        Where memory runs out, all go on once with half of the batch: noise is keyed by slice, so
        that it changes nothing.

        Raises
        ------
        OutOfMemory
            Half of a batch is too much, too.
        """
        halved = False

        def halve(error: Exception) -> None:
            nonlocal size, halved
            if halved or size == 1:
                raise OutOfMemory(
                    f"A network evaluation of {size} slices needs more memory than there is.",
                    expected="memory for one scan: see Sizing in docs/operations.md.",
                    advice="Send it again when less runs on this machine, or give the worker more memory.",
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
                    tick(len(parts[-1]))
                return np.concatenate(parts)

            return call

        return Models(batched(self.encode), batched(self.denoise), batched(self.decode))
