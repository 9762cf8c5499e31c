import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks.report import NOT_MEASURED, phase_lines, render, row_cells
from benchmarks.rows import (
    BY_NAME,
    ENSEMBLE,
    MEMBERS,
    PUBLISHED_ENSEMBLE,
    PUBLISHED_KNOWN_ENSEMBLE,
    PUBLISHED_MEMBERS,
    ROWS,
    TRANSFORMER,
)
from benchmarks.summary import volume_seconds
from benchmarks.targets import MIN_RATIOS, compare_targets
from benchmarks.waterfall import draw_waterfall
from training.config import ROOT


def timed(seconds: list[float], sample: int, evaluations: int, stride: int = 1) -> dict[str, Any]:
    counts = {"encode": sample, "denoise": evaluations}
    sizes = {"slices": 60, "sample": sample, "stride": stride}
    # Half of the time is the loop over noise levels.
    return {
        "repeats": [{"seconds": s, "loop_seconds": s / 2, **sizes, "counts": counts} for s in seconds],
        "cold_seconds": 2.0,
        "peak_bytes": 500_000_000,
        "accuracy": None,
    }


def upload(seconds: float, model: str = "t1-0.0.0") -> dict[str, Any]:
    return {"id": model, "seconds": seconds, "upload": 0.5, "work": {}}


SPANS = [
    {"phase": "read the file", "start": 0.0, "end": 1.0, "network": False},
    {"phase": "KL map", "start": 1.0, "end": 1.5, "network": False},
    {"phase": "KL map", "start": 1.5, "end": 4.0, "network": True},
]
BEFORE_SPANS = [{"phase": "KL map", "start": 0.0, "end": 40.0, "network": True}]
ACCURACY = {"dice": [0.5, 0.7], "auprc": [0.4, 0.5], "refused": 0, "slices": 8}
DOCUMENT: dict[str, Any] = {
    "rows": {
        "service": {**timed([3.0, 4.0, 3.0], 60, 180), "accuracy": ACCURACY},
        "service-float32": {**timed([4.0, 5.0, 4.0], 60, 180), "accuracy": {"dice": [0.605], "auprc": [0.48]}},
        "ddim-slice": timed([6.0, 8.0, 9.0], 4, 1000),
        "ddim-batch": {**timed([2.0, 2.0, 2.0], 15, 375, 10), "accuracy": {"dice": [0.62], "auprc": [0.45]}},
        "pixel-250": timed([12.0, 12.0, 12.0], 8, 2000),
    },
    "start": {"help": [0.2], "scan": [2.5]},
    "waterfall": {
        "after": {
            "spans": SPANS,
            "phases": {"read the file": {"seconds": 1.0, "network": 0.0}, "KL map": {"seconds": 3.0, "network": 2.5}},
        },
        "before": {"spans": BEFORE_SPANS, "phases": {"KL map": {"seconds": 40.0, "network": 40.0}}},
        "seconds": [4.0],
    },
    "volume": {"megabytes": 8.0, "runs": [upload(9.0), upload(6.0), upload(8.0)], "peak_bytes": 900_000_000},
    "ct": {
        "megabytes": 50.0,
        "runs": [upload(30.0, "headct-1.0.0"), upload(19.0, "headct-1.0.0")],
        "peak_bytes": 1_600_000_000,
        "rows": {"ddim-slice": timed([6.0], 4, 1000)},
    },
    "parts": {
        "rows": {"measured": "2026-01-01 10:00 UTC", "seconds": 600.0, "repeats": 3},
        "ct": {"failed": "ValueError: no"},
    },
    "notes": [],
    "version": "1.2.3",
    "machine": "2 cores",
    "bundle": "t1-0.0.0",
    "scan": "scan.nii.gz",
}


def cells(name: str, document: dict[str, Any] = DOCUMENT) -> list[str]:
    return row_cells(BY_NAME[name], document)


def test_service_is_timed_on_the_whole_volume() -> None:
    assert cells("service")[1:] == [
        "3.00 [3.00, 4.00]",
        "1.0 [1.0, 1.0]",
        "50.0 [50.0, 66.7]",
        "all 60 slices",
        "19.0 [19.0, 19.0], upload to mask",
        "3.0",
        "500",
        "2.0",
        "0.600",
        "0.450",
    ]


def test_sample_is_scaled() -> None:
    assert volume_seconds(DOCUMENT["rows"]["ddim-slice"]) == [90.0, 120.0, 135.0]
    row = cells("ddim-slice")
    assert row[1:6] == [
        "120.00 [90.00, 135.00]",
        "30.0 [30.0, 45.0]",
        "2000.0 [1500.0, 2250.0]",
        "4 of 60 slices",
        "90.0, slices, scaled",
    ]
    assert row[-2:] == ["not measured", "not measured"]


def test_omitted_noise_levels_multiply_only_the_loop() -> None:
    # Of 2 s, 1 is the loop: 1 + 10 * 1 = 11 for 15 of 60 slices.
    assert volume_seconds(DOCUMENT["rows"]["ddim-batch"]) == [44.0] * 3
    row = cells("ddim-batch")
    assert row[4] == "15 of 60 slices, 1 of 10 noise levels"
    assert row[6] == "250.0"


def test_strides_divide_the_plans() -> None:
    steps = {"ddim": (200, 50), "ancestral": (200, 500), "pixel-250": (250,), "pixel-500": (500,)}
    for row in ROWS:
        for name in (n for n in steps if row.name.startswith(n)):
            assert all(count % row.stride == 0 for count in steps[name]), row.name


def test_untrained_row_has_no_accuracy() -> None:
    row = cells("pixel-250")
    assert row[0].endswith("(untrained)")
    assert row[-2:] == ["-", "-"]


def test_row_without_service_and_ct_has_empty_cells() -> None:
    document = copy.deepcopy(DOCUMENT)
    del document["rows"]["service"], document["ct"]
    assert cells("ddim-slice", document)[2:6:3] == ["-", "-"]


def test_targets_are_compared_with_the_results() -> None:
    assert [(target.found, target.met) for target in compare_targets(DOCUMENT)] == [
        ("30.0 [30.0, 45.0] times", True),
        ("14.7 [11.0, 14.7] times", True),
        *[("", None)] * 7,
        ("0.600 against 0.620 (2 lesions)", False),
        ("0.450 against 0.450 (2 lesions)", True),
        ("75 %", True),
        ("0.600 against 0.605 (2 lesions)", True),
        ("0.450 against 0.480 (2 lesions)", False),
        ("7.00 [6.00, 8.00] s", True),
        ("1.50 [1.50, 1.50] s", True),
        ("19.00 [19.00, 19.00] s", True),
        ("1.60 [1.60, 1.60] GB", False),
        ("0.20 [0.20, 0.20] s", True),
        ("2.50 [2.50, 2.50] s", False),
    ]
    assert {target.verdict for target in compare_targets({})} == {"not measured"}


def test_transformers_have_targets_of_their_own() -> None:
    rows = [row for row in ROWS if row.family == TRANSFORMER]
    document: dict[str, Any] = {"rows": {"service": timed([1.0], 60, 180)}}
    for row in rows:
        document["rows"][row.name] = timed([1.0], row.sample or 60, 1920, row.stride)
    met = {name: target.met for name, target in zip(MIN_RATIOS, compare_targets(document), strict=False)}
    assert [met[row.name] for row in rows] == [(0.5 + 0.5 * row.stride) * 60 / (row.sample or 60) >= 50 for row in rows]
    assert cells(ENSEMBLE, document)[4] == "16 of 60 slices, 1 of 4 members"


def test_ensembles_have_the_members_of_the_experiments_and_of_the_publication() -> None:
    pytest.importorskip("torch")
    from training.experiments import transformer

    assert BY_NAME[ENSEMBLE].stride == MEMBERS == transformer.MEMBERS
    assert BY_NAME[PUBLISHED_ENSEMBLE].stride == BY_NAME[PUBLISHED_KNOWN_ENSEMBLE].stride == PUBLISHED_MEMBERS == 8


def test_phases_add_up() -> None:
    assert phase_lines(DOCUMENT["waterfall"]) == [
        ["read the file", "-", "1.00", "25 %", "0.00"],
        ["KL map", "40.00", "3.00", "75 %", "2.50"],
        ["**all**", "**40.00**", "**4.00**", "**100 %**", "**2.50**"],
    ]


def test_page_has_numbers_and_failures() -> None:
    page = render(DOCUMENT, "figures/waterfall.png")
    assert "![Waterfall of one scan](figures/waterfall.png)" in page
    assert "rows: 2026-01-01 10:00 UTC, 3 repeats, 10.0 minutes." in page
    assert "ValueError: no." in page
    assert "| T1 volume | t1-0.0.0 | 8 | 9.00 | 7.00 [6.00, 8.00] | 0.50 [0.50, 0.50] | 900 |" in page


def test_page_without_results_says_so() -> None:
    empty = {key: DOCUMENT[key] for key in ("notes", "version", "machine", "bundle", "scan")}
    assert render({**empty, "parts": {}}, "a").count(NOT_MEASURED) == 3


def test_committed_page_is_rendered_from_the_committed_results() -> None:
    document = json.loads((ROOT / "docs" / "BENCHMARKS.json").read_text())
    assert render(document, "figures/waterfall.png") == (ROOT / "docs" / "BENCHMARKS.md").read_text()


def test_figure_is_drawn(tmp_path: Path) -> None:
    draw_waterfall(DOCUMENT["waterfall"], tmp_path / "new" / "waterfall.png")
    assert (tmp_path / "new" / "waterfall.png").read_bytes().startswith(b"\x89PNG")
