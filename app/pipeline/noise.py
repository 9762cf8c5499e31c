"""Noise that depends only on what it is for.

Drawn from a generator keyed by (seed, purpose and view, t, slice): skipping slices, batching, or
halving a batch changes nothing.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from app.volume import FloatArray


class Purpose(IntEnum):
    """What a draw is for; part of its key, so numbers are never reused."""

    KL = 1
    START = 2
    KNOWN = 3


PURPOSES = len(Purpose) + 1


@dataclass(frozen=True)
class KeyedNoise:
    """Standard normal noise for latents.

    Attributes
    ----------
    seed : int
        The manifest's, or the caller's.
    shape : tuple of int
        (C, h, w) of one slice's latent.
    view : int
        Which of the manifest's views; 0 is the plain one.
    """

    seed: int
    shape: tuple[int, int, int]
    view: int = 0

    def __call__(self, purpose: Purpose, slices: npt.NDArray[np.int64], t: int) -> FloatArray:
        """Noise of some slices (their indices in the scan's stack) at one t, (N, C, h, w)."""
        drawn = np.empty((len(slices), *self.shape), dtype=np.float32)
        for row, index in enumerate(slices):
            # View and purpose share a word: a fifth could be mistaken for the second word of a large seed.
            key = [self.seed, int(purpose) + PURPOSES * self.view, t, int(index)]
            generator = np.random.default_rng(key)
            generator.standard_normal(out=drawn[row], dtype=np.float32)
        return drawn
