"""Parts on their own: one that fails costs no other, and what an earlier run found stays."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from benchmarks.gains import Switch
from benchmarks.missing import Missing
from benchmarks.parts import Plan
from benchmarks.profile import operations, operators
from benchmarks.run import earlier, make_plan, measure
from benchmarks.worker import Job
from tests.support.bundle import add_int8, write_tiny_bundle
from training.config import ROOT

CONFIG = ROOT / "training" / "configs" / "t1.toml"
PLAN = Plan(Job(Path("b"), Path("c"), Path("s")), None, Path("d"), ())


def test_a_part_that_fails_keeps_what_was_found_and_lets_the_others_go_on() -> None:
    def fail(_: Plan) -> dict[str, Any]:
        raise ValueError("broken")

    def lack(_: Plan) -> dict[str, Any]:
        raise Missing("no head")

    parts = {"a": fail, "b": lack, "c": lambda _: {"c": 3}}
    kept: list[dict[str, Any]] = []
    document: dict[str, Any] = {"a": "old", "parts": {"a": {"measured": "before", "seconds": 1.0}}}
    measure(PLAN, list(parts), document, lambda d: kept.append(json.loads(json.dumps(d))), parts)
    assert document["a"] == "old"
    assert document["parts"]["a"] == {"measured": "before", "seconds": 1.0, "failed": "ValueError: broken"}
    assert document["parts"]["b"] == {"failed": "no head"}
    assert document["c"] == 3
    assert "failed" not in document["parts"]["c"]
    assert [sorted(d["parts"]) for d in kept] == [["a"], ["a", "b"], ["a", "b", "c"]]


def test_parts_of_another_scan_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "BENCHMARKS.json"
    same = {"machine": "m", "bundle": "b", "scan": "s"}
    assert earlier(path, same) == {}
    path.write_text(json.dumps({**same, "rows": 1}))
    assert earlier(path, same)["rows"] == 1
    assert earlier(path, {**same, "scan": "t"}) == {}


def test_without_the_data_a_scan_of_ones_own_is_enough(tmp_path: Path) -> None:
    options = Namespace(
        config=CONFIG, scan=None, bundle=None, rows=None, quick=False, thorough=False, cases=4, sample=None, repeats=3
    )
    with pytest.raises(SystemExit, match=r"No scan sub-61_T1w\.nii\.gz: name one with --scan"):
        make_plan(options, tmp_path)
    options.scan = tmp_path / "mine.nii.gz"
    options.scan.touch()
    plan, notes = make_plan(options, tmp_path)
    assert plan.job.cases == 0
    assert len(notes) == 2 - ("service-float32" in [row.name for row in plan.rows])
    assert "t1_ds002748" in notes[-1]
    assert plan.ct is not None
    assert plan.ct.bundle.name.startswith("headct-")


def test_float32_is_a_row_of_its_own_where_int8_is_served(tmp_path: Path) -> None:
    options = Namespace(
        config=CONFIG, scan=tmp_path / "mine.nii.gz", bundle=write_tiny_bundle(tmp_path), rows=["service-float32"],
        quick=False, thorough=False, cases=4, sample=None, repeats=3,
    )  # fmt: skip
    options.scan.touch()
    plan, notes = make_plan(options, tmp_path)
    assert plan.rows == ()
    assert notes[0] == "The bundle has no denoiser in int8: the service computes in float32, and has one row."
    add_int8(options.bundle)
    plan, notes = make_plan(options, tmp_path)
    assert [row.name for row in plan.rows] == ["service-float32"]
    assert len(notes) == 1


def test_a_switch_is_measured_in_turns_after_a_first_time() -> None:
    calls: list[str] = []
    ticks = iter(np.arange(0.0, 100.0))
    switch = Switch("n", "r", 2.0, lambda: calls.append("-"), lambda: calls.append("+"), times=5.0)
    found = switch.measure(2, lambda: float(next(ticks)))
    assert calls == ["-", "+"] * 3
    assert found == {"name": "n", "reason": "r", "predicted": 2.0, "without": [5.0, 5.0], "with_it": [1.0, 1.0]}


def event(name: str, kind: str, microseconds: int, shapes: tuple[list[list[int]], list[int]]) -> dict[str, Any]:
    inputs, output = shapes
    types = {"input_type_shape": [{"float": s} for s in inputs], "output_type_shape": [{"float": output}]}
    sizes = {"activation_size": "1000", "parameter_size": "0", "output_size": "1000"}
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "dur": microseconds,
        "args": {"op_name": kind, **types, **sizes},
    }


def test_operators_are_summed_without_the_first_evaluation() -> None:
    conv = ([[2, 3, 8, 8], [5, 3, 3, 3]], [2, 5, 8, 8])
    events = [event("a", "Conv", us, conv) for us in (900, 100, 300)]
    events += [event("b", "Add", us, ([[4], [4]], [4])) for us in (900, 10, 30)]
    found = operators([*events, {"cat": "Session", "name": "whole"}], runs=2)
    assert [o["operator"] for o in found] == ["Conv", "Add"]
    assert found[0]["seconds"] == pytest.approx(200e-6)
    # 2 * 640 outputs * 27 weights each.
    assert found[0]["gigaflop"] == pytest.approx(2 * 640 * 27 / 1e9)
    assert found[1] == {"operator": "Add", "seconds": pytest.approx(20e-6), "gigaflop": 0.0, "gigabytes": 2e-6}


def test_a_convolution_in_int8_has_its_weights_behind_scales() -> None:
    shapes = ([[2, 3, 8, 8], [1], [1], [5, 3, 3, 3], [5], [5]], [2, 5, 8, 8])
    assert operations(event("a", "QLinearConv", 1, shapes)["args"]) == 2 * 640 * 27


def test_products_are_counted_where_their_weights_were_packed() -> None:
    args = event("a", "FusedMatMul", 1, ([[16, 120, 128]], [16, 120, 512]))["args"]
    assert operations(args) == 2 * 16 * 120 * 128 * 512
