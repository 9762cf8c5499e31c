"""Network for batches of one size, with inputs and outputs at fixed addresses on the device.

CUDA graphs need it: onnxruntime captures the first evaluation and replays it at the same addresses afterwards. New
inputs are copied there. On a CPU it computes the same, which is how it is tested.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from app.errors import OutOfMemory
from app.runtime.session import Provider, raise_out_of_memory
from app.volume import FloatArray

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[np.generic]

TYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class FixedBatch:
    """Network as a callable on any number of slices, which it splits and pads to batches of one size.

    It is not thread-safe, because all calls write to the same addresses.

    Parameters
    ----------
    open_at : callable
        Opens a session for one batch size (`app.runtime.session.open_session`).
    size : int
        Slices in a batch. It is halved for good if memory runs out.
    device : {"cpu", "cuda"}
        Device of the session and of its inputs and outputs.
    """

    def __init__(
        self, open_at: Callable[[int], "onnxruntime.InferenceSession"], size: int, device: Provider = "cuda"
    ) -> None:
        self._open_at = open_at
        self._device = device
        self.size = size
        self._bound: _BoundSession | None = None

    def open(self) -> None:
        """Open the session and allocate its inputs and output. Otherwise the first call does it.

        Raises
        ------
        OutOfMemory
            The device has too little memory.
        """
        with raise_out_of_memory():
            self._bound = _BoundSession(self._open_at(self.size), self.size, self._device)

    def __call__(self, *arrays: Array) -> FloatArray:
        """Evaluate (N, ...) -> (N, ...) for any N.

        Raises
        ------
        OutOfMemory
            The device has too little memory. The next call uses batches of half the size.
        """
        try:
            if self._bound is None:
                self.open()
            assert self._bound is not None, "it was opened"
            starts = range(0, len(arrays[0]), self.size)
            with raise_out_of_memory():
                return np.concatenate([self._bound.run([a[i : i + self.size] for a in arrays]) for i in starts])
        except OutOfMemory:
            self._bound = None  # frees its memory before a smaller session allocates
            self.size = max(1, self.size // 2)
            raise


class _BoundSession:
    """Session with one buffer for each input and for its only output."""

    def __init__(self, session: "onnxruntime.InferenceSession", size: int, device: Provider) -> None:
        from onnxruntime import OrtValue  # noqa: PLC0415 - it was found when the session was opened

        def allocate(node: Any) -> Any:
            shape = [size, *node.shape[1:]]
            return OrtValue.ortvalue_from_shape_and_type(shape, TYPES[node.type], device, 0)

        self._session, self._size = session, size
        self._binding = session.io_binding()
        self._inputs = []
        for node in session.get_inputs():
            self._inputs.append(allocate(node))
            self._binding.bind_ortvalue_input(node.name, self._inputs[-1])
        (output,) = session.get_outputs()
        self._output = allocate(output)
        self._binding.bind_ortvalue_output(output.name, self._output)

    def run(self, arrays: list[Array]) -> FloatArray:
        """Evaluate at most one batch."""
        count = len(arrays[0])
        for value, array in zip(self._inputs, arrays, strict=True):
            value.update_inplace(_pad(array, self._size))
        self._session.run_with_iobinding(self._binding)
        result: FloatArray = self._output.numpy()[:count].copy()  # on a CPU, numpy() may return the buffer itself
        return result


def _pad(array: Array, size: int) -> Array:
    """Pad a batch with zeros. They do not change the results, because slices are independent of each other."""
    if len(array) == size:
        return np.ascontiguousarray(array)
    full = np.zeros((size, *array.shape[1:]), dtype=array.dtype)
    full[: len(array)] = array
    return full
