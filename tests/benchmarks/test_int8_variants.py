"""The table of what int8 costs and buys: one batch, one line a variant."""

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks.int8_variants import CALLS, Settings, batch_of, line
from benchmarks.statistics import Summary
from training.quantise import KEPT, Healthy, Kept


def test_a_variant_is_a_line() -> None:
    noise = np.ones((2, 1, 1, 1), np.float32)
    times = [np.full(2, t, np.int64) for t in (10, 10, 50)]
    seen = Healthy([], [], [0 * noise] * 3, times, [noise, noise, 3 * noise])
    assert batch_of(seen.feeds("denoiser"))[0].shape == (6, 1, 1, 1)
    summaries = dict.fromkeys(CALLS, Summary(2, 1, 3))
    told = line("v", summaries, {10: 0.25, 50: 0.25 / 9}, 50, {"dice": [0.2, 0.4], "auprc": [1], "refused": 1})
    assert told == "| v | 2 (1 to 3) | 2 (1 to 3) | 2 (1 to 3) | 2.8%; 25.0% | 0.300 | 1.000 | 1 |"


def test_the_denoiser_alone_is_quantised_by_default() -> None:
    assert Settings().networks == {"denoiser": KEPT}
    assert Settings(Kept(1, 1), None, Kept(2, 2)).networks == {"encoder": Kept(1, 1), "decoder": Kept(2, 2)}
