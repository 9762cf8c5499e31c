"""The page: what is scaled says so, what was not measured stays empty, and ratios are of this run."""

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks.figures import draw_waterfall
from benchmarks.report import main_table, phase_table, render, volume_seconds
from benchmarks.rows import ROWS, UNTRAINED
from benchmarks.run import chosen_rows, median_trace, newest_bundle
from benchmarks.trace import Span


def found(seconds: list[float], sample: int, evaluations: int) -> dict[str, Any]:
    counts = {"encode": sample, "denoise": evaluations}
    return {
        "repeats": [{"seconds": s, "slices": 60, "sample": sample, "counts": counts} for s in seconds],
        "cold_seconds": 2.0,
        "peak_bytes": 500_000_000,
        "gigaflops": {"encode": 0.5, "denoise": 1.0},
        "accuracy": None,
    }


DOCUMENT: dict[str, Any] = {
    "rows": {
        "service": {**found([3.0, 4.0, 3.0], 60, 180), "accuracy": {"dice": [0.5, 0.7], "auprc": [0.4, 0.5]}},
        "ddim-slice": found([6.0, 8.0, 9.0], 4, 1000),
        "pixel-250": {**found([12.0, 12.0, 12.0], 8, 2000), "accuracy": {"reason": UNTRAINED}},
    },
    "gigaflops": {},
    "ceiling": [{"float32": 100.0, "int8": 400.0}] * 3,
    "start": {"help": [0.2], "golden": [1.0], "scan": [1.5]},
    "phases": {"read": {"seconds": 1.0, "network": 0.0}, "KL": {"seconds": 3.0, "network": 2.5}},
    "machine": "2 cores",
    "repeats": 3,
    "bundle": "t1-0.0.0",
    "scan": "scan.nii.gz",
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_service_is_measured_whole() -> None:
    row = cells(main_table(DOCUMENT)[2])
    assert row[1:6] == ["3.00 (3.00 to 4.00)", "1.0 (1.0 to 1.0)", "50.0 (50.0 to 66.7)", "all 60 slices", "3.0"]
    # (180 evaluations and 60 encodings) / 60 slices = 3.5 GFLOP; 60 slices in 3 s: 70 GFLOP/s of 100.
    assert row[6:10] == ["3.50", "70", "70%", "-"]
    assert row[10:] == ["500", "2.0", "0.600", "0.450"]


def test_a_sample_is_scaled_and_says_so() -> None:
    assert volume_seconds(DOCUMENT["rows"]["ddim-slice"]) == [90.0, 120.0, 135.0]
    row = cells(main_table(DOCUMENT)[3])
    assert row[1:5] == [
        "120.00 (90.00 to 135.00)",
        "30.0 (30.0 to 45.0)",
        "2000.0 (1500.0 to 2250.0)",
        "4 of 60 slices, scaled",
    ]
    assert row[-2:] == ["not measured", "not measured"]


def test_untrained_weights_have_no_accuracy() -> None:
    row = cells(main_table(DOCUMENT)[4])
    assert row[0].endswith("(untrained weights)")
    assert row[-2:] == [UNTRAINED, UNTRAINED]
    assert [r.name for r in ROWS if not r.trained] == ["pixel-250", "pixel-500", "transformer"]


def test_what_was_not_counted_is_empty() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["rows"]["service"]["gigaflops"] = {}
    assert cells(main_table(document)[2])[6:10] == ["-", "-", "-", "-"]
    del document["rows"]["service"]
    assert cells(main_table(document)[2])[2] == "-"


def test_the_phases_sum_to_the_scan() -> None:
    lines = phase_table(DOCUMENT["phases"])
    assert cells(lines[3]) == ["KL", "3.00", "75%", "2.50"]
    assert cells(lines[-1]) == ["**all**", "**4.00**", "", "**2.50**; everything else 1.50"]


def test_the_page_has_its_numbers() -> None:
    page = render(DOCUMENT, "figures/waterfall.png")
    assert "float32 100 (100 to 100) GFLOP/s, int8 400 (400 to 400) GOP/s" in page
    assert "on the scan 1.50 (1.50 to 1.50) s" in page
    assert "![Waterfall of one scan](figures/waterfall.png)" in page


def test_the_waterfall_is_drawn(tmp_path: Path) -> None:
    spans = [Span("read", 0.0, 1.0, network=False), Span("KL", 1.0, 2.5, network=True)]
    draw_waterfall(spans, tmp_path / "new" / "waterfall.png")
    assert (tmp_path / "new" / "waterfall.png").read_bytes().startswith(b"\x89PNG")


def test_the_trace_that_is_shown_took_the_median_time() -> None:
    traces = [[Span("read", 0.0, end, network=False)] for end in (5.0, 3.0, 4.0)]
    assert median_trace(traces)[0].end == 4.0


def test_rows_and_bundles_are_chosen_by_name(tmp_path: Path) -> None:
    assert chosen_rows(None) == list(ROWS)
    assert [r.name for r in chosen_rows(["transformer", "service"])] == ["service", "transformer"]
    with pytest.raises(SystemExit, match="No row fast; there are service,"):
        chosen_rows(["fast"])
    for version in ("1.9.0", "1.10.0"):
        (tmp_path / f"t1-{version}").mkdir()
        (tmp_path / f"t1-{version}" / "manifest.json").touch()
    assert newest_bundle("t1", tmp_path).name == "t1-1.10.0"
    with pytest.raises(SystemExit, match=r"No bundle ct-\* in"):
        newest_bundle("ct", tmp_path)
