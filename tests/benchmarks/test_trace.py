from collections import Counter
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest

from app.pipeline.models import Models
from benchmarks.trace import (
    KL,
    OOD,
    OTHER,
    PHASES,
    REVERSE,
    TRACED,
    Span,
    Tracer,
    count_evaluations,
    median_trace,
    sum_phases,
)


@pytest.mark.parametrize("path", TRACED)
def test_traced_function_exists(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert callable(getattr(resolve_name(module), name)), f"{path} was renamed or moved: change benchmarks.trace.TRACED"
    assert TRACED[path] in PHASES


def test_time_counts_for_the_innermost_phase() -> None:
    ticks: Iterator[float] = iter([100.0, 101.0, 103.0, 107.0, 108.0, 110.0])
    tracer = Tracer(clock=lambda: next(ticks))
    with tracer.phase(KL), tracer.phase(KL, network=True):
        pass
    spans = tracer.finish()
    assert spans == [
        Span(OTHER, 0.0, 1.0, network=False),
        Span(KL, 1.0, 3.0, network=False),
        Span(KL, 3.0, 7.0, network=True),
        Span(KL, 7.0, 8.0, network=False),
        Span(OTHER, 8.0, 10.0, network=False),
    ]
    assert sum_phases(spans) == {KL: {"seconds": 7.0, "network": 4.0}, OTHER: {"seconds": 3.0, "network": 0.0}}


def test_denoiser_counts_for_its_caller_and_decoder_does_not() -> None:
    tracer = Tracer()
    denoise = tracer.wrap(lambda: sum(range(1000)), "denoise")
    decode = tracer.wrap(lambda: sum(range(1000)), "decode")
    tracer.wrap(denoise, REVERSE)()
    tracer.wrap(decode, OOD)()
    spans = {(s.phase, s.network) for s in tracer.finish()}
    assert {(REVERSE, True), ("decode", True)} <= spans
    assert not any(phase == "denoise" for phase, _ in spans)


def test_kl_maps_of_the_out_of_distribution_check_count_for_the_check() -> None:
    tracer = Tracer()
    kl_map = tracer.wrap(tracer.wrap(lambda: sum(range(1000)), "denoise"), KL)
    tracer.wrap(kl_map, OOD)()
    assert KL not in {s.phase for s in tracer.finish()}
    kl_map()
    assert {(OOD, True), (KL, True)} <= {(s.phase, s.network) for s in tracer.finish()}


def test_shown_trace_has_the_median_time() -> None:
    traces = [[Span(OTHER, 0.0, end, network=False)] for end in (5.0, 3.0, 4.0)]
    assert median_trace(traces)[-1].end == 4.0


def test_evaluations_are_counted_by_slice() -> None:
    def network(*arrays: Any) -> Any:
        return arrays[0] + 1

    counts = Counter[str]()
    counted = count_evaluations(Models(network, network, network), counts)
    np.testing.assert_array_equal(counted.encode(np.zeros(3, np.float32)), np.ones(3))
    counted.denoise(np.zeros(2, np.float32), np.zeros(2, np.int64))
    counted.denoise(np.zeros(4, np.float32), np.zeros(4, np.int64))
    assert counts == {"encode": 3, "denoise": 6}
