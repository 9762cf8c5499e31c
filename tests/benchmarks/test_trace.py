"""Phases of a scan: every traced function exists, and time is counted once."""

from collections.abc import Iterator
from pkgutil import resolve_name

import pytest

from benchmarks.startup import read_probe
from benchmarks.trace import ORDER, PHASES, Span, Tracer, totals


@pytest.mark.parametrize("path", PHASES)
def test_every_traced_function_exists(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert callable(getattr(resolve_name(module), name)), f"{path} was renamed or moved: tell benchmarks.trace"
    assert PHASES[path] in ORDER


def test_time_belongs_to_the_innermost_phase() -> None:
    ticks: Iterator[float] = iter([100.0, 101.0, 103.0, 107.0, 108.0, 110.0])
    tracer = Tracer(clock=lambda: next(ticks))
    with tracer.phase("KL"), tracer.phase("KL", network=True):
        pass
    spans = tracer.finish()
    assert spans == [
        Span("everything else", 0.0, 1.0, network=False),
        Span("KL", 1.0, 3.0, network=False),
        Span("KL", 3.0, 7.0, network=True),
        Span("KL", 7.0, 8.0, network=False),
        Span("everything else", 8.0, 10.0, network=False),
    ]
    assert totals(spans) == {
        "KL": {"seconds": 7.0, "network": 4.0},
        "everything else": {"seconds": 3.0, "network": 0.0},
    }


def test_the_denoiser_belongs_to_whoever_asks_it() -> None:
    tracer = Tracer()
    denoise = tracer.wrap(lambda z: sum(range(1000)) + len(z), "denoise")
    reverse = tracer.wrap(denoise, "reverse")
    gate = tracer.wrap(tracer.wrap(len, "decode"), "gate")
    reverse("three")
    reverse("2.")
    gate("one")
    phases = {(s.phase, s.network) for s in tracer.finish()}
    assert ("reverse", True) in phases
    assert ("decode", True) in phases
    assert tracer.asked == {"reverse": {"denoise": 7}, "decode": {"decode": 3}}
    assert not any(phase == "denoise" for phase, _ in phases)


def test_the_gates_own_kl_maps_are_the_gates() -> None:
    tracer = Tracer()
    denoise = tracer.wrap(lambda z: sum(range(1000)) + len(z), "denoise")
    kl_map = tracer.wrap(denoise, "KL")
    tracer.wrap(kl_map, "gate")("abc")
    kl_map("ab")
    assert tracer.asked == {"gate": {"denoise": 3}, "KL": {"denoise": 2}}
    phases = {(s.phase, s.network) for s in tracer.finish()}
    assert {("gate", True), ("KL", True)} <= phases


def test_the_probe_tells_the_golden_pair_from_the_scan() -> None:
    text = "evaluated 11.0\nevaluated 11.5\nscan\nevaluated 13.0\nevaluated 14.0\n"
    assert read_probe(text, 10.0) == {"golden": 1.0, "scan": 3.0}
