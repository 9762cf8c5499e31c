"""The page: what is scaled says so, what was not measured stays empty, and ratios are of this run."""

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks.bars import Bar, bars, bars_table, volume_seconds
from benchmarks.parts import Plan
from benchmarks.report import ABSENT, render
from benchmarks.rows import ROWS, UNTRAINED
from benchmarks.run import chosen_rows, measure, newest_bundle
from benchmarks.tables import main_table, phase_table
from benchmarks.worker import Job


def found(seconds: list[float], sample: int, evaluations: int, every: int = 1) -> dict[str, Any]:
    counts = {"encode": sample, "denoise": evaluations}
    repeat = {"slices": 60, "sample": sample, "counts": counts, "every": every, "loop_seconds": 0.0}
    return {
        "repeats": [{**repeat, "seconds": s} for s in seconds],
        "cold_seconds": 2.0,
        "peak_bytes": 500_000_000,
        "gigaflops": {"encode": 0.5, "denoise": 1.0},
        "accuracy": None,
    }


DOCUMENT: dict[str, Any] = {
    "rows": {
        "service": {**found([3.0, 4.0, 3.0], 60, 180), "accuracy": {"dice": [0.5, 0.7], "auprc": [0.4, 0.5]}},
        "ddim-batch": {**found([1.0, 1.0, 1.0], 16, 4000), "accuracy": {"dice": [0.4, 0.4], "auprc": [0.46, 0.46]}},
        "ddim-slice": found([6.0, 8.0, 9.0], 4, 1000),
        "pixel-250": {**found([12.0, 12.0, 12.0], 8, 80, every=25), "accuracy": {"reason": UNTRAINED}},
    },
    "ceiling": [{"float32": 100.0, "int8": 400.0}] * 3,
    "start": {"help": [0.2], "golden": [1.0], "scan": [2.5]},
    "waterfall": {
        "after": {
            "phases": {"resample": {"seconds": 1.0, "network": 0.0}, "KL": {"seconds": 3.0, "network": 2.5}},
            "asked": {"KL": {"denoise": 100}},
        },
        "before": {"phases": {"KL": {"seconds": 9.0, "network": 8.0}}},
        "ceiling": [{"float32": 100.0, "int8": 400.0}],
        "gigaflops": {"encode": 0.5, "denoise": 1.0, "decode": 0.5},
    },
    "parts": {"rows": {"measured": "today", "seconds": 60.0, "repeats": 3}, "ct": {"failed": "no head"}},
    "notes": ["Something was left out."],
    "version": "9.9.9",
    "machine": "2 cores",
    "bundle": "t1-0.0.0",
    "scan": "scan.nii.gz",
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def line(name: str) -> list[str]:
    rows = {cells(one)[0]: cells(one) for one in main_table(DOCUMENT)}
    title = next(row.title for row in ROWS if row.name == name)
    return rows.get(title) or rows[f"{title} (untrained weights)"]


def test_the_service_is_measured_whole() -> None:
    row = line("service")
    assert row[1:7] == ["3.00 (3.00 to 4.00)", "1.0 (1.0 to 1.0)", "50.0 (50.0 to 66.7)", "all 60 slices", "-", "3.0"]
    # (180 evaluations and 60 encodings) / 60 slices = 3.5 GFLOP; 60 slices in 3 s: 70 GFLOP/s of 100.
    assert row[7:11] == ["3.50", "70", "70%", "18%"]
    assert row[11:] == ["500", "2.0", "0.600", "0.450"]


def test_a_sample_is_scaled_and_says_so() -> None:
    assert volume_seconds(DOCUMENT["rows"]["ddim-slice"]) == [90.0, 120.0, 135.0]
    row = line("ddim-slice")
    assert row[1:3] == ["120.00 (90.00 to 135.00)", "30.0 (30.0 to 45.0)"]
    assert row[4] == "4 of 60 slices, scaled"
    assert row[-2:] == ["not measured", "not measured"]


def test_noise_levels_that_were_left_out_are_counted() -> None:
    """One in 25 was measured: the loop's seconds are taken 25 times, the evaluations too."""
    row = copy.deepcopy(DOCUMENT["rows"]["pixel-250"])
    row["repeats"][0] |= {"seconds": 5.0, "loop_seconds": 4.0}
    assert volume_seconds(row)[0] == pytest.approx((1 + 25 * 4) * 60 / 8)
    assert line("pixel-250")[6] == "250.0"
    assert line("pixel-250")[4] == "8 of 60 slices, 1 of 25 noise levels, scaled"
    assert line("pixel-250")[-2:] == [UNTRAINED, UNTRAINED]


def test_bars_are_judged_by_what_was_measured() -> None:
    said = {bar.text: bar for bar in bars(DOCUMENT)}

    def one(words: str) -> Bar:
        return next(bar for text, bar in said.items() if words in text)

    assert one("slice by slice").met is True  # 30 times, of 20
    assert one("in batches").met is False  # 3.75 x 1 s against 3 s
    assert one("transformer").met is None
    assert one("Dice").met is True
    assert one("AUPRC").met is True, "0.45 is within 0.01 of 0.46"
    assert one("everything but the networks").met is True  # 1.0 + 0.5 s
    assert one("512 x 512").met is None
    assert one("--help").met is True
    assert one("first network evaluation").met is False
    table = "\n".join(bars_table(DOCUMENT))
    assert table.count("**missed**") == 2
    assert table.count("not measured") == 4


def test_a_series_is_judged_by_time_and_memory() -> None:
    runs = [{"seconds": s, "upload": 0.5, "id": "headct-1.0.0"} for s in (40.0, 9.0, 10.0)]
    ct = {"runs": runs, "peak_bytes": 1_600_000_000, "megabytes": 39, "rows": {}}
    time, memory = (bar for bar in bars({"ct": ct}) if bar.met is not None)
    assert time.met, "the first upload opened the networks, and is told apart"
    assert not memory.met


def test_the_phases_sum_to_the_scan() -> None:
    lines = [cells(one) for one in phase_table(DOCUMENT["waterfall"], 0.05)]
    kl = next(one for one in lines if one[0] == "KL")
    # 100 evaluations of 1 GFLOP in 2.5 s.
    assert kl == ["KL", "9.00", "3.00", "75%", "2.50", "40", "40%"]
    assert lines[-1][:5] == ["**all, from the file**", "**9.00**", "**4.00**", "", "**2.50**; everything else 1.50"]


def test_the_page_has_its_numbers_and_what_failed() -> None:
    page = render(DOCUMENT, "figures/waterfall.png", "figures/scaling.png")
    assert "float32 100 (100 to 100) GFLOP/s, int8 400 (400 to 400) GOP/s" in page
    assert "on the scan 2.50 (2.50 to 2.50) s" in page
    assert "![Waterfall of one scan](figures/waterfall.png)" in page
    assert "ct failed in the last run: no head." in page
    assert "Something was left out." in page
    assert page.count(ABSENT) == 4


def test_a_part_that_fails_costs_no_other(tmp_path: Path) -> None:
    kept: list[dict[str, Any]] = []
    plan = Plan(Job(tmp_path, tmp_path, tmp_path, 1, 0), None, tmp_path, ())

    def broken(_: Plan) -> dict[str, Any]:
        raise OSError("gone")

    document: dict[str, Any] = {"volume": 1}
    measure(
        plan,
        ["volume", "ct"],
        document,
        lambda d: kept.append(copy.deepcopy(d)),
        {"volume": broken, "ct": lambda _: {"ct": 2}},
    )
    assert document["volume"] == 1
    assert document["ct"] == 2
    assert document["parts"]["volume"]["failed"] == "OSError: gone"
    assert "measured" in document["parts"]["ct"]
    assert len(kept) == 2, "what is known is kept after each part"


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
