"""The same slice looked at in several ways, whose results are averaged.

A head is nearly symmetrical and has no grid, so that its counterpart should not depend on how it is shown. What a
network gets wrong does depend on it, and so does where a lesion falls on the grid of latents: both average out
(test-time augmentation).
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from app.manifest import View

T = TypeVar("T", bound=np.generic)


def turn(stack: npt.NDArray[T], view: View) -> npt.NDArray[T]:
    """Slices as a view shows them, (..., H, W); what leaves on one side comes back on the other."""
    mirrored = stack[..., ::-1] if view.mirrored else stack
    return np.ascontiguousarray(np.roll(mirrored, view.shift, axis=(-2, -1)))


def turn_back(stack: npt.NDArray[T], view: View) -> npt.NDArray[T]:
    """The inverse of `turn`."""
    rows, columns = view.shift
    moved = np.roll(stack, (-rows, -columns), axis=(-2, -1))
    return np.ascontiguousarray(moved[..., ::-1] if view.mirrored else moved)
