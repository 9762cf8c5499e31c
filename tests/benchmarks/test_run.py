import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from benchmarks.ct_series import MissingDataError
from benchmarks.parts import Plan
from benchmarks.run import load_earlier, make_plan, measure, newest_bundle, select
from benchmarks.worker import Inputs
from tests.support.bundle import add_int8, write_tiny_bundle
from training.config import ROOT

PLAN = Plan(Inputs(Path("b"), Path("c"), Path("s")), None, Path("d"), ())


@pytest.fixture
def options(tmp_path: Path) -> Namespace:
    (tmp_path / "own.nii.gz").touch()
    return Namespace(
        config=ROOT / "training" / "configs" / "t1.toml", scan=tmp_path / "own.nii.gz", bundle=None, rows=None,
        quick=False, thorough=False, cases=4, sample=None, repeats=3,
    )  # fmt: skip


def test_failed_part_keeps_its_earlier_result_and_other_parts_run() -> None:
    def fail(_: Plan) -> dict[str, Any]:
        raise ValueError("broken")

    def lack(_: Plan) -> dict[str, Any]:
        raise MissingDataError("no head")

    parts = {"a": fail, "b": lack, "c": lambda _: {"c": 3}}
    saved: list[dict[str, Any]] = []
    document: dict[str, Any] = {"a": "old", "parts": {"a": {"measured": "before", "seconds": 1.0}}}
    measure(PLAN, list(parts), document, lambda d: saved.append(json.loads(json.dumps(d))), parts)
    assert document["a"] == "old"
    assert document["parts"]["a"] == {"measured": "before", "seconds": 1.0, "failed": "ValueError: broken"}
    assert document["parts"]["b"] == {"failed": "no head"}
    assert document["c"] == 3
    assert "failed" not in document["parts"]["c"]
    assert [sorted(d["parts"]) for d in saved] == [["a"], ["a", "b"], ["a", "b", "c"]]


def test_results_of_another_scan_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "BENCHMARKS.json"
    identity = {"machine": "m", "bundle": "b", "scan": "s"}
    assert load_earlier(path, identity) == {}
    path.write_text(json.dumps({**identity, "rows": 1}))
    assert load_earlier(path, identity)["rows"] == 1
    assert load_earlier(path, {**identity, "scan": "t"}) == {}


def test_scan_is_required(tmp_path: Path, options: Namespace) -> None:
    options.scan = None
    with pytest.raises(SystemExit, match="--scan"):
        make_plan(options, tmp_path)


def test_accuracy_needs_the_data_folder(tmp_path: Path, options: Namespace) -> None:
    plan, notes = make_plan(options, tmp_path)
    assert plan.inputs.cases == 0
    assert "t1_ds002748" in notes[-1]
    assert plan.ct is not None
    assert plan.ct.bundle.name.startswith("headct-")


def test_float32_is_a_row_only_if_the_bundle_has_int8(tmp_path: Path, options: Namespace) -> None:
    options.bundle, options.rows = write_tiny_bundle(tmp_path), ["service-float32"]
    plan, notes = make_plan(options, tmp_path)
    assert plan.rows == ()
    assert "int8" in notes[0]
    add_int8(options.bundle)
    plan, notes = make_plan(options, tmp_path)
    assert [row.name for row in plan.rows] == ["service-float32"]
    assert len(notes) == 1


def test_names_are_selected_in_their_own_order() -> None:
    known = ["service", "pixel-250", "transformer"]
    assert select(None, known, "row") == known
    assert select(["transformer", "service"], known, "row") == ["service", "transformer"]
    with pytest.raises(SystemExit, match="fast"):
        select(["fast"], known, "row")


def test_newest_bundle_has_the_highest_version(tmp_path: Path) -> None:
    for version in ("1.9.0", "1.10.0", "pinaya2022-2.0.0"):  # the last one is another bundle
        (tmp_path / f"t1-{version}").mkdir()
        (tmp_path / f"t1-{version}" / "manifest.json").touch()
    assert newest_bundle("t1", tmp_path).name == "t1-1.10.0"
    with pytest.raises(SystemExit, match="ct"):
        newest_bundle("ct", tmp_path)
