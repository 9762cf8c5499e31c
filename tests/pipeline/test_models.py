"""Networks evaluated a batch at a time."""

from typing import Any

import numpy as np
import pytest

from app.errors import Cancelled, OutOfMemory
from app.pipeline.networks import Networks

Z = np.arange(7 * 3 * 2 * 2, dtype=np.float32).reshape(7, 3, 2, 2)


def counting(sizes: list[int]) -> Networks:
    """Models that note the batches they see."""

    def network(*arrays: Any) -> Any:
        assert len({len(a) for a in arrays}) == 1, "every argument is cut alike"
        sizes.append(len(arrays[0]))
        return np.asarray(sum(a.reshape(len(a), -1).sum(axis=1) for a in arrays), dtype=np.float32)

    either: Any = network
    return Networks(either, either, either)


@pytest.mark.parametrize(("size", "expected"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_batches_cover_every_slice_once(size: int, expected: list[int]) -> None:
    sizes: list[int] = []
    ticks: list[int] = []
    networks = counting(sizes).in_batches(size, ticks.append)
    t = np.full(7, 500)
    np.testing.assert_array_equal(networks.denoise(Z, t), Z.reshape(7, -1).sum(axis=1) + 500)
    assert sizes == ticks == expected


def test_all_three_networks_are_batched_and_ticked() -> None:
    sizes: list[int] = []
    ticks: list[int] = []
    networks = counting(sizes).in_batches(4, ticks.append)
    networks.encode(Z)
    networks.denoise(Z, np.full(7, 1))
    networks.decode(Z)
    assert sizes == ticks == [4, 3] * 3


def test_a_tick_that_raises_stops_before_the_next_batch() -> None:
    sizes: list[int] = []

    def cancel(_: int) -> None:
        raise Cancelled("Asked to stop.", expected="-", advice="-")

    with pytest.raises(Cancelled):
        counting(sizes).in_batches(2, cancel).encode(Z)
    assert sizes == [2]


@pytest.mark.parametrize("error", [MemoryError(), OutOfMemory("-", expected="-", advice="-")])
def test_memory_that_runs_out_halves_the_batch_for_all_networks_and_changes_nothing(error: Exception) -> None:
    sizes: list[int] = []
    plain = counting(sizes)

    def tight(*arrays: Any) -> Any:
        if len(arrays[0]) > 2:
            raise error
        return plain.encode(*arrays)

    either: Any = tight
    networks = Networks(either, either, either).in_batches(5, lambda _: None)
    np.testing.assert_array_equal(networks.encode(Z), plain.encode(Z))
    networks.decode(Z)
    assert sizes == [2, 2, 2, 1, 7, 2, 2, 2, 1]
    with pytest.raises(OutOfMemory, match="3 slices"):
        Networks(either, either, either).in_batches(6, lambda _: None).denoise(Z, np.full(7, 1))
