from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.pipeline.diffusion import Networks
from app.runtime.bundle import load_bundle
from benchmarks.trace import (
    DECOMPRESS,
    KL,
    OOD,
    OTHER,
    PHASES,
    READ,
    RESAMPLE,
    RESAMPLE_BACK,
    REVERSE,
    TRACED,
    WRITE,
    Span,
    Tracer,
    count_evaluations,
    median_trace,
    sum_phases,
    trace_scan,
)
from tests.support.phantom import brain, grid


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
    networks: list[Any] = [network] * 3
    counted = count_evaluations(Networks(*networks), counts)
    np.testing.assert_array_equal(counted.encode(np.zeros(3, np.float32)), np.ones(3))
    counted.denoise(np.zeros(2, np.float32), np.zeros(2, np.int64))
    counted.denoise(np.zeros(4, np.float32), np.zeros(4, np.int64))
    assert counts == {"encode": 3, "denoise": 6}


def test_scan_is_traced(tiny_models: Path, tmp_path: Path) -> None:
    head = brain((52, 64, 48), grid((52, 64, 48)))
    nib.save(nib.Nifti1Image(head.array, head.affine), tmp_path / "scan.nii.gz")
    bundle = load_bundle(next(path.parent for path in tiny_models.glob("tiny-*/manifest.json")), threads=1)
    (tmp_path / "out").mkdir()
    spans = trace_scan(bundle, tmp_path / "scan.nii.gz", tmp_path / "out")
    assert {READ, DECOMPRESS, RESAMPLE, "encode", KL, OOD, RESAMPLE_BACK, WRITE} <= sum_phases(spans).keys()
    assert all(a.end == b.start for a, b in pairwise(spans))
    assert (tmp_path / "out" / "mask.nii.gz").is_file()
