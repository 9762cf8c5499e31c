"""Networks evaluated in batches."""

from typing import Any

import numpy as np
import pytest

from app.errors import Cancelled, OutOfMemory
from app.pipeline.networks import Networks

Z = np.arange(7 * 3 * 2 * 2, dtype=np.float32).reshape(7, 3, 2, 2)


def recording(sizes: list[int]) -> Networks:
    """Return networks that record the sizes of their batches."""

    def network(*arrays: Any) -> Any:
        assert len({len(a) for a in arrays}) == 1
        sizes.append(len(arrays[0]))
        return np.asarray(sum(a.reshape(len(a), -1).sum(axis=1) for a in arrays), dtype=np.float32)

    either: Any = network
    return Networks(either, either, either)


@pytest.mark.parametrize(("size", "expected"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_batches_cover_every_slice_once(size: int, expected: list[int]) -> None:
    sizes: list[int] = []
    reported: list[int] = []
    networks = recording(sizes).in_batches(size, reported.append)
    t = np.full(7, 500)
    np.testing.assert_array_equal(networks.denoise(Z, t), Z.reshape(7, -1).sum(axis=1) + 500)
    assert sizes == reported == expected


def test_all_three_networks_run_in_batches() -> None:
    sizes: list[int] = []
    reported: list[int] = []
    networks = recording(sizes).in_batches(4, reported.append)
    networks.encode(Z)
    networks.denoise(Z, np.full(7, 1))
    networks.decode(Z)
    assert sizes == reported == [4, 3] * 3


def test_callback_that_raises_stops_before_the_next_batch() -> None:
    sizes: list[int] = []

    def cancel(_: int) -> None:
        raise Cancelled("Cancelled.", expected="-", advice="-")

    with pytest.raises(Cancelled):
        recording(sizes).in_batches(2, cancel).encode(Z)
    assert sizes == [2]


@pytest.mark.parametrize("error", [MemoryError(), OutOfMemory("-", expected="-", advice="-")])
def test_batch_is_halved_once_if_memory_runs_out(error: Exception) -> None:
    sizes: list[int] = []
    plain = recording(sizes)

    def limited(*arrays: Any) -> Any:
        if len(arrays[0]) > 2:
            raise error
        return plain.encode(*arrays)

    either: Any = limited
    networks = Networks(either, either, either).in_batches(5, lambda _: None)
    np.testing.assert_array_equal(networks.encode(Z), plain.encode(Z))
    networks.decode(Z)
    assert sizes == [2, 2, 2, 1, 7, 2, 2, 2, 1]
    with pytest.raises(OutOfMemory, match="3 slices"):
        Networks(either, either, either).in_batches(6, lambda _: None).denoise(Z, np.full(7, 1))
