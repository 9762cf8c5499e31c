"""A network for batches of one size, whose inputs and outputs stay at one place on the device.

What CUDA graphs need: onnxruntime captures an evaluation when it first runs, and from then on replays it on the same
addresses. New inputs are copied to where the old ones were. On the CPU it computes the same, which is how it is tested.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from app.errors import OutOfMemory
from app.runtime.session import Provider, allocating
from app.volume import FloatArray

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[np.generic]

TYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class FixedBatch:
    """A network as a callable on arrays of any number of slices: split and filled up to batches of one size.

    Not for several threads at once: they would write to the same place.

    Parameters
    ----------
    open_at : callable
        Batch size -> a session that runs this size alone (`app.runtime.session.open_session`).
    size : int
        Slices in a batch; halved for good where the memory does not suffice.
    device : {"cpu", "cuda"}
        Where the session runs, and inputs and outputs lie.
    """

    def __init__(
        self, open_at: Callable[[int], "onnxruntime.InferenceSession"], size: int, device: Provider = "cuda"
    ) -> None:
        self._open_at = open_at
        self._device = device
        self.size = size
        self._bound: _Bound | None = None

    def open(self) -> None:
        """Open the session and allocate what it needs; the first call does it otherwise.

        Raises
        ------
        OutOfMemory
            The device has too little.
        """
        with allocating():
            self._bound = _Bound(self._open_at(self.size), self.size, self._device)

    def __call__(self, *arrays: Array) -> FloatArray:
        """Evaluate (N, ...) -> (N, ...), whatever N.

        Raises
        ------
        OutOfMemory
            The device has too little; the next call takes batches of half the size.
        """
        try:
            if self._bound is None:
                self.open()
            assert self._bound is not None, "it was opened"
            starts = range(0, len(arrays[0]), self.size)
            with allocating():
                return np.concatenate([self._bound.run([a[i : i + self.size] for a in arrays]) for i in starts])
        except OutOfMemory:
            self._bound = None  # gives back what it holds, before a smaller one asks for more
            self.size = max(1, self.size // 2)
            raise


class _Bound:
    """A session with one place for each input and for its only output."""

    def __init__(self, session: "onnxruntime.InferenceSession", size: int, device: Provider) -> None:
        from onnxruntime import OrtValue  # noqa: PLC0415 - it was found when the session was opened

        def place(node: Any) -> Any:
            shape = [size, *node.shape[1:]]
            return OrtValue.ortvalue_from_shape_and_type(shape, TYPES[node.type], device, 0)

        self._session, self._size = session, size
        self._binding = session.io_binding()
        self._inputs = []
        for node in session.get_inputs():
            self._inputs.append(place(node))
            self._binding.bind_ortvalue_input(node.name, self._inputs[-1])
        (output,) = session.get_outputs()
        self._output = place(output)
        self._binding.bind_ortvalue_output(output.name, self._output)

    def run(self, arrays: list[Array]) -> FloatArray:
        """At most a batch: copied to its place, evaluated, and as much copied back."""
        count = len(arrays[0])
        for value, array in zip(self._inputs, arrays, strict=True):
            value.update_inplace(_filled(array, self._size))
        self._session.run_with_iobinding(self._binding)
        result: FloatArray = self._output.numpy()[:count].copy()  # numpy() of the CPU's may be the place itself
        return result


def _filled(array: Array, size: int) -> Array:
    """A batch of the full size; what was missing is zero: slices do not know of each other."""
    if len(array) == size:
        return np.ascontiguousarray(array)
    full = np.zeros((size, *array.shape[1:]), dtype=array.dtype)
    full[: len(array)] = array
    return full
