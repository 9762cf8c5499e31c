"""The page says what the numbers say, and marks where Counterpart is not ahead."""

import json
from pathlib import Path
from typing import Any

import pytest

from training.experiments import pages, report


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def row(value: float, gap: float | None) -> dict[str, Any]:
    made: dict[str, Any] = {k: interval(value) for k in ("auprc", "dice", "scan_auprc", "scan_dice")}
    if gap is None:
        return made | {"cases": 3, "scan_shipped": interval(0.33)}
    return made | {"cases": 3, "behind": {"auprc": interval(gap), "dice": interval(gap)}}


def test_a_lead_that_is_no_lead_is_bold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"choice": {"variant": "bright", "smoothing": 1.0}, "seconds_per_slice": 0.01, "parameters": 2_000_000}
    rows = {"counterpart": row(0.6, None), "vae": row(0.2, 0.4), "intensity": row(0.59, 0.01)}
    hashes = dict.fromkeys(("bundle_sha256", "detection_sha256", "split_sha256", "data_sha256"), "0" * 64)
    told = {"bundle": "t1-9.9.9", "split": "s.json", "seed": 1, "code": "abc", "threads": 1, **hashes}
    methods = dict.fromkeys(rows, facts) | {"vae": facts | {"provenance": {"code": "newer"}}}
    document = {"provenance": told, "kinds": {"grade 2": rows}, "methods": methods}
    (tmp_path / "shapes.json").write_text(json.dumps(document))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(pages, "EVALUATION", tmp_path / "evaluation")
    report.write()
    page = (tmp_path / "RESULTS.md").read_text()
    lines = {line.split(" | ")[0].strip("| "): line for line in reversed(page.splitlines())}
    ahead, behind = lines["variational autoencoder"], lines["intensity threshold"]
    assert "+0.40 (+0.35 to +0.45), +0.40" in ahead
    assert "**+0.01 (-0.04 to +0.06)**" in behind
    assert "0.33 (0.28 to 0.38)" in page
    assert "t1-9.9.9" in page
    assert "1. Which picture" not in page, "a part that was not measured is not told of"
    assert "Calibration that holds" not in page
    assert page.index("## Bars that were set") < page.index("## 2b.")
    assert "| shapes, grade 2: Counterpart above every opponent | above 1 of 2 that ran, 3 scans; not above: " in page
    ends = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip(" |") for line in page.splitlines()}
    assert (ends["variational autoencoder"], ends["intensity threshold"]) == ("`newer`", "`abc`"), "by row"


def test_what_the_gate_refused_is_told_by_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = [{"outcome": "analysed", "false_positive_ml": ml} for ml in (0.5, 4.0, 1.0)]
    healthy += [{"outcome": "out_of_distribution"}, {"outcome": "no_healthy_slice"}]
    hand = {"kind": "Hand", "outcomes": {"wrong_field_of_view": 37, "out_of_distribution": 1, "analysed": 2}}
    sha = {"bundle_sha256": "5" * 64}
    alone = {"kind": "healthy, each by itself", "outcomes": {"out_of_distribution": 3, "analysed": 97}}
    whole = {"healthy": sha | {"rows": healthy}, "foreign": sha | {"rows": [hand]}, "single": sha | {"rows": [alone]}}
    (tmp_path / "t1.json").write_text(json.dumps(whole))
    (tmp_path / "flair.json").write_text(json.dumps({"healthy": sha | {"rows": healthy[:1]}}))
    monkeypatch.setattr(pages, "EVALUATION", tmp_path)
    shapes = {"provenance": {"bundle": "t1-9.9.9"}, "kinds": {"grade 2": {"counterpart": row(0.6, None)}}}
    page = "\n".join(pages.calibration_section({"shapes": shapes}))
    assert "| t1 (`555555555555`) | 4 | 1.00 (0.50 to 4.00) | 1 |" in page
    assert "| flair (`555555555555`) | 1 | 0.50 (0.50 to 0.50) | 0 |" in page
    assert "| scans of another kind | refused by t1 (`555555555555`) |" in page
    assert "| Hand | 38 of 40 |" in page
    assert "| healthy, each by itself | 3 of 100 |" in page
    assert "| t1-9.9.9 | grade 2 | 0.33 (0.28 to 0.38) | 0.60 (0.55 to 0.65) | 0.60 (0.55 to 0.65) |" in page
