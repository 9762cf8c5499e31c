"""The host's switches do the same work on both sides."""

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from app.volume import Volume
from benchmarks import switches_host
from tests.support.bundle import write_tiny_bundle


def test_compressed_slices_are_the_same_however_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    volume = Volume(np.arange(40 * 36 * 5, dtype=np.float32).reshape(40, 36, 5), np.eye(4))
    near, wavelets = switches_host.decoding(volume, tmp_path)
    assert near.predicted == 2
    whole, parts = near.without(), near.with_it()
    np.testing.assert_array_equal(whole, volume.array)
    assert isinstance(parts, list)
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part, volume.array[..., i::2])
    assert wavelets.predicted == pytest.approx(1 / (0.13 + 0.435))
    np.testing.assert_array_equal([a for a, _ in wavelets.without()], [a for a, _ in wavelets.with_it()])  # type: ignore[attr-defined]


def test_the_calling_thread_is_pinned_and_let_go() -> None:
    before = os.sched_getaffinity(0)
    with switches_host.on_core(min(before)):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


def test_a_process_of_the_pool_keeps_its_denoiser(tmp_path: Path) -> None:
    switches_host.open_denoiser(write_tiny_bundle(tmp_path))
    switches_host.run_batch(0)
    assert len(switches_host._batches) == 1
