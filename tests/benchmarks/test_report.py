"""The page: what is scaled says so, what was not measured stays empty, and ratios are of this run."""

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks.bars import FASTER, bars, bars_table, volume_seconds
from benchmarks.figures import draw_scaling, draw_waterfall
from benchmarks.profile import IN_INT8
from benchmarks.report import ABSENT, render
from benchmarks.rows import (
    ENSEMBLE,
    MEMBERS,
    PUBLISHED_ENSEMBLE,
    PUBLISHED_KNOWN_ENSEMBLE,
    PUBLISHED_MEMBERS,
    ROWS,
    TRANSFORMER,
    UNTRAINED,
    kind_of,
)
from benchmarks.run import chosen_rows, newest_bundle
from benchmarks.tables import gains_table, main_table, overlap, phase_table, profile_table
from benchmarks.trace import Span, Trace, median_trace
from training.experiments import transformer


def found(seconds: list[float], sample: int, evaluations: int, every: int = 1) -> dict[str, Any]:
    counts = {"encode": sample, "denoise": evaluations}
    sizes = {"slices": 60, "sample": sample, "every": every}
    # Half of the time is the loop over noise levels.
    return {
        "repeats": [{"seconds": s, "loop_seconds": s / 2, **sizes, "counts": counts} for s in seconds],
        "cold_seconds": 2.0,
        "peak_bytes": 500_000_000,
        "gigaflops": {"encode": 0.5, "denoise": 1.0},
        "accuracy": None,
    }


def upload(seconds: float, model: str = "t1-0.0.0") -> dict[str, Any]:
    return {"id": model, "seconds": seconds, "upload": 0.5, "work": {}, "findings": 1}


SPANS = [
    {"phase": "decode the file", "start": 0.0, "end": 1.0, "network": False},
    {"phase": "KL", "start": 1.0, "end": 1.5, "network": False},
    {"phase": "KL", "start": 1.5, "end": 4.0, "network": True},
]
AFTER: dict[str, Any] = {
    "spans": SPANS,
    "phases": {"decode the file": {"seconds": 1.0, "network": 0.0}, "KL": {"seconds": 3.0, "network": 2.5}},
    "asked": {"KL": {"denoise": 125}},
}
BEFORE_SPANS = [{"phase": "KL", "start": 0.0, "end": 40.0, "network": True}]
CEILING = [{"float32": 100.0, "int8": 400.0}] * 3
ACCURATE = {"dice": [0.5, 0.7], "auprc": [0.4, 0.5]}
DOCUMENT: dict[str, Any] = {
    "rows": {
        "service": {**found([3.0, 4.0, 3.0], 60, 180), "accuracy": ACCURATE},
        "ddim-slice": found([6.0, 8.0, 9.0], 4, 1000),
        "ddim-batch": {**found([2.0, 2.0, 2.0], 15, 375, 10), "accuracy": {"dice": [0.62], "auprc": [0.45]}},
        "pixel-250": {**found([12.0, 12.0, 12.0], 8, 2000), "accuracy": {"reason": UNTRAINED}},
    },
    "ceiling": CEILING,
    "start": {"help": [0.2], "golden": [1.0], "scan": [2.5]},
    "waterfall": {
        "after": AFTER,
        "before": {"spans": BEFORE_SPANS, "phases": {"KL": {"seconds": 40.0, "network": 40.0}}, "asked": {}},
        "seconds": [4.0],
        "ceiling": CEILING,
        "gigaflops": {"encode": 0.5, "denoise": 1.0, "decode": 0.5},
    },
    "profile": {
        "networks": {
            "denoiser": [
                {"operator": "Conv", "seconds": 0.6, "gigaflop": 45.0, "gigabytes": 0.6},
                {"operator": "Mul", "seconds": 0.3, "gigaflop": 0.0, "gigabytes": 3.0},
                {"operator": "Softmax", "seconds": 0.09, "gigaflop": 0.0, "gigabytes": 0.09},
                {"operator": "Cast", "seconds": 0.01, "gigaflop": 0.0, "gigabytes": 0.0},
            ]
        },
        "memory": 14.0,
        "batch": 16,
    },
    "gains": [{"name": "batches", "reason": "because", "predicted": 2.0, "without": [3.0], "with_it": [2.0]}],
    "volume": {"megabytes": 8.0, "runs": [upload(9.0), upload(6.0), upload(8.0)], "peak_bytes": 900_000_000},
    "ct": {
        "megabytes": 50.0,
        "runs": [upload(30.0, "headct-1.0.0"), upload(19.0, "headct-1.0.0")],
        "peak_bytes": 1_600_000_000,
        "rows": {"ddim-slice": found([6.0], 4, 1000)},
    },
    "scaling": {
        "slices": [{"value": 0.5, "shape": [4, 4, 2], "runs": [upload(3.0)], "peak_bytes": 5_000_000}],
        "resolution": [{"value": 2.0, "shape": [2, 2, 2], "runs": [upload(2.0)], "peak_bytes": 5_000_000}],
        "together": [
            {"workers": 1, "scans": 1, "seconds": [4.0], "peak_bytes": 5_000_000},
            {"workers": 1, "scans": 2, "seconds": [6.4], "peak_bytes": 5_000_000},
        ],
        "cores": 2,
    },
    "parts": {
        "rows": {"measured": "2026-01-01 10:00 UTC", "seconds": 600.0, "repeats": 3},
        "gains": {"failed": "ValueError: no"},
    },
    "notes": [],
    "version": "1.2.3",
    "machine": "2 cores",
    "bundle": "t1-0.0.0",
    "scan": "scan.nii.gz",
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def row_of(name: str, document: dict[str, Any] = DOCUMENT) -> list[str]:
    names = [row.name for row in ROWS if row.name in document["rows"]]
    return cells(main_table(document)[2 + names.index(name)])


def test_the_service_is_measured_whole() -> None:
    row = row_of("service")
    assert row[1:5] == ["3.00 (3.00 to 4.00)", "1.0 (1.0 to 1.0)", "50.0 (50.0 to 66.7)", "all 60 slices"]
    assert row[5:7] == ["19.0 (19.0 to 19.0), upload to mask", "3.0"]
    # (180 evaluations and 60 encodings) / 60 slices = 3.5 GFLOP; 60 slices in 3 s: 70 GFLOP/s of 100, and of 400.
    assert row[7:11] == ["3.50", "70", "70%", "18%"]
    assert row[11:] == ["500", "2.0", "0.600", "0.450"]


def test_a_sample_is_scaled_and_says_so() -> None:
    assert volume_seconds(DOCUMENT["rows"]["ddim-slice"]) == [90.0, 120.0, 135.0]
    row = row_of("ddim-slice")
    assert row[1:6] == [
        "120.00 (90.00 to 135.00)",
        "30.0 (30.0 to 45.0)",
        "2000.0 (1500.0 to 2250.0)",
        "4 of 60 slices, scaled",
        "90.0, slices alone, scaled",
    ]
    assert row[-2:] == ["not measured", "not measured"]


def test_left_out_noise_levels_are_multiplied_in_the_loop_alone() -> None:
    # Of 2 s, 1 is the loop: 1 + 10 * 1 = 11 for 15 of 60 slices.
    assert volume_seconds(DOCUMENT["rows"]["ddim-batch"]) == [44.0] * 3
    row = row_of("ddim-batch")
    assert row[4] == "15 of 60 slices, 1 of 10 noise levels, scaled"
    assert row[6:8] == ["250.0", "250.50"]


def test_what_is_left_out_divides_the_plans() -> None:
    steps = {"ddim": (200, 50), "ancestral": (200, 500), "pixel-250": (250,), "pixel-500": (500,)}
    for row in ROWS:
        for name in (n for n in steps if row.name.startswith(n)):
            assert all(count % row.every == 0 for count in steps[name]), row.name


def test_untrained_weights_have_no_accuracy() -> None:
    row = row_of("pixel-250")
    assert row[0].endswith("(untrained weights)")
    assert row[-2:] == [UNTRAINED, UNTRAINED]
    assert [r.name for r in ROWS if not r.trained] == ["pixel-250", "pixel-500", *(name for name, *_ in FASTER[2:])]


def test_what_was_not_counted_is_empty() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["rows"]["service"]["gigaflops"] = {}
    assert row_of("service", document)[7:9] == ["3.50", "70"]  # of the waterfall's networks
    del document["waterfall"]
    assert row_of("service", document)[7:11] == ["-", "-", "-", "-"]
    del document["rows"]["service"], document["ct"]
    assert row_of("ddim-slice", document)[2:6:3] == ["-", "-"]


def test_the_bars_are_judged_by_what_was_measured() -> None:
    found = [(bar.found, bar.met) for bar in bars(DOCUMENT)]
    assert found == [
        ("30.0 (30.0 to 45.0) times", True),
        ("14.7 (11.0 to 14.7) times", True),
        *[("not measured", None)] * 7,
        ("0.600 against 0.620, 2 lesions", False),
        ("0.450 against 0.450, 2 lesions", True),
        ("7.00 (6.00 to 8.00) s", True),
        ("1.50 (1.50 to 1.50) s", True),
        ("19.00 (19.00 to 19.00) s", True),
        ("1.60 (1.60 to 1.60) GB", False),
        ("0.20 (0.20 to 0.20) s", True),
        ("2.50 (2.50 to 2.50) s", False),
    ]
    assert [bar.met for bar in bars({})] == [None] * len(found)
    assert bars_table(DOCUMENT)[2].endswith("| met |")
    assert bars_table(DOCUMENT)[11].endswith("| **missed** |")
    assert bars_table(DOCUMENT)[4].endswith("| not measured | - |")


def test_the_phases_sum_to_the_scan_and_have_their_share_of_the_ceiling() -> None:
    lines = phase_table(DOCUMENT["waterfall"], 0.5)
    assert cells(lines[2]) == ["receive (over HTTP)", "-", "0.50", "-", "-", "-", "-"]
    assert cells(lines[3]) == ["decode the file", "-", "1.00", "25%", "0.00", "-", "-"]
    # 125 evaluations of 1 GFLOP in 2.5 s.
    assert cells(lines[4]) == ["KL", "40.00", "3.00", "75%", "2.50", "50", "50%"]
    assert cells(lines[5])[1:5] == ["**40.00**", "**4.00**", "", "**2.50**; everything else 1.50"]


def test_an_operator_is_bound_by_the_ceiling_that_it_reaches() -> None:
    lines = profile_table(DOCUMENT["profile"], {"float32": 100.0, "int8": 400.0})
    assert cells(lines[2]) == ["denoiser", "Conv", "60%", "75, 75%", "1.0", "arithmetic"]
    assert cells(lines[3]) == ["denoiser", "Mul", "30%", "-", "10.0", "memory"]
    assert cells(lines[4])[-1].startswith("neither")
    assert cells(lines[5])[1:3] == ["all others", "1%"]
    conv = {"operator": IN_INT8, "seconds": 0.6, "gigaflop": 45.0, "gigabytes": 0.6}
    in_int8 = {**DOCUMENT["profile"], "networks": {"denoiser": [conv]}}
    assert cells(profile_table(in_int8, {"float32": 100.0, "int8": 400.0})[2])[3] == "75, 19%"


def test_gains_stand_beside_what_was_predicted() -> None:
    assert cells(gains_table(DOCUMENT["gains"])[2])[1:] == [
        "2.0", "because", "1.50 (1.50 to 1.50)", "3.00", "2.00"
    ]  # fmt: skip
    both = overlap(DOCUMENT["scaling"], DOCUMENT["waterfall"])
    assert both is not None
    # 2 x 4 s, of which 1.5 s of one can be hidden.
    assert both["predicted"] == pytest.approx(8 / 6.5)
    assert (both["without"], both["with_it"]) == ([8.0], [6.4])


def test_the_page_has_its_numbers() -> None:
    page = render(DOCUMENT, "figures/waterfall.png", "figures/scaling.png")
    assert page.startswith("# Benchmarks\n\n| bar | measured |")
    assert "float32 100 (100 to 100) GFLOP/s, int8 400 (400 to 400) GOP/s" in page
    assert "on the scan 2.50 (2.50 to 2.50) s" in page
    assert "![Waterfall of one scan](figures/waterfall.png)" in page
    assert "rows 2026-01-01 10:00 UTC (10.0 min, repeats: 3)" in page
    assert "gains failed in the last run: ValueError: no." in page
    assert "| the T1 volume | t1-0.0.0 | 8 | 9.00 | 7.00 (6.00 to 8.00) | 0.50 (0.50 to 0.50) | 900 |" in page


def test_a_page_of_nothing_says_so() -> None:
    nothing = {key: DOCUMENT[key] for key in ("notes", "version", "machine", "bundle", "scan")}
    page = render({**nothing, "parts": {}}, "a", "b")
    assert page.count(ABSENT) == 7
    assert "parts: none." in page


def test_the_figures_are_drawn(tmp_path: Path) -> None:
    draw_waterfall(DOCUMENT["waterfall"], tmp_path / "new" / "waterfall.png")
    draw_scaling(DOCUMENT["scaling"], tmp_path / "scaling.png")
    for path in (tmp_path / "new" / "waterfall.png", tmp_path / "scaling.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_trace_that_is_shown_took_the_median_time() -> None:
    traces = [Trace([Span("write", 0.0, end, network=False)], {}) for end in (5.0, 3.0, 4.0)]
    assert median_trace(traces).seconds == 4.0


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


def test_transformers_are_judged_each_by_its_own_time() -> None:
    transformers = [row for row in ROWS if kind_of(row) == TRANSFORMER]
    document: dict[str, Any] = {"rows": {"service": found([1.0], 60, 180)}, "ceiling": CEILING}
    for row in transformers:
        document["rows"][row.name] = found([1.0], row.sample or 60, 1920, row.every)
    judged = {name: bar.met for (name, *_), bar in zip(FASTER, bars(document), strict=False)}
    assert [judged[row.name] for row in transformers] == [
        (0.5 + 0.5 * row.every) * 60 / (row.sample or 60) >= 50 for row in transformers
    ]
    assert len({text for _, _, text in FASTER}) == len(FASTER)
    assert row_of(ENSEMBLE, document)[4] == "16 of 60 slices, 1 of 4 members, scaled"


def test_ensembles_as_in_the_experiments_and_as_published() -> None:
    every = {row.name: row.every for row in ROWS}
    assert every[ENSEMBLE] == MEMBERS == transformer.MEMBERS
    assert every[PUBLISHED_ENSEMBLE] == every[PUBLISHED_KNOWN_ENSEMBLE] == PUBLISHED_MEMBERS == 8
