"""Tests of the results on one page: the committed page and figures, and the data of the figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.pipeline.risk_control import FACTORS
from training.results_page import figures
from training.results_page.__main__ import FIGURES, PAGE, write
from training.results_page.aims import Aim, Limit, make_aims
from training.results_page.formats import NO_VALUE
from training.results_page.groups import (
    Haemorrhage,
    compared_lesions,
    haemorrhage_groups,
    home_groups,
    inserted_dice,
    outlined_groups,
    phases,
    real_t1_outcomes,
    together,
    unseen_groups,
    warm_seconds,
)
from training.results_page.records import HEADCT_ON_CT_ICH, Bundles, Part, Records
from training.results_page.sections import NOT_MEASURED

SHIPPED = Bundles({"new": "t1-2.0.0", "edited": "t1-2.0.0", "old": "t1-1.0.0"}, {"t1": "new", "flair": "", "ct": ""})


def records(**parts: list[dict[str, Any]]) -> Records:
    """Return records with some parts of `t1`, all measured with the shipped bundle."""
    evaluation = {("t1", name): Part("t1", "t1-2.0.0", "new", rows) for name, rows in parts.items()}
    return Records(evaluation, {}, {}, SHIPPED)


def head(person: str, ml: float | None, kind: str = "A", **fields: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": kind, "person": person, "in_training": False, "counted": True}
    outcome = {"outcome": "out_of_distribution"} if ml is None else {"outcome": "analysed", "found_ml": ml}
    return row | outcome | fields


def lesion(subject: str, dice: float, contrast: float = 0.35, **fields: Any) -> dict[str, Any]:
    row = {"subject": subject, "shape": "s", "contrast": contrast, "dice": dice, "lesions": [(1.0, dice > 0)]}
    return row | fields


# ---- committed page and figures ----------------------------------------------------------------


def test_committed_page_and_figures_are_those_of_the_records(tmp_path: Path) -> None:
    write(tmp_path / "RESULTS.md", tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == PAGE.read_text()
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in FIGURES.glob("results-*.png")}
    for name in drawn:
        assert figures.stored_digest(FIGURES / name) == figures.stored_digest(tmp_path / name), name
        assert (FIGURES / name).stat().st_size < 150_000


def test_page_is_written_without_any_record(tmp_path: Path) -> None:
    write(tmp_path / "RESULTS.md", tmp_path, Records({}, {}, {}, SHIPPED))
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.count(NOT_MEASURED) == 5
    assert not list(tmp_path.glob("*.png"))


def test_figure_of_other_data_has_another_hash(tmp_path: Path) -> None:
    for name, ml in (("a", 1.0), ("b", 2.0)):
        groups = unseen_groups(records(heads=[head("p", ml), head("q", None)]))
        figures.draw_unseen(tmp_path / f"{name}.png", groups, together(groups), (1.0, 3.0))
    assert figures.stored_digest(tmp_path / "a.png") != figures.stored_digest(tmp_path / "b.png")


# ---- bundles -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("digest", "label"),
    [
        ("new", "t1-2.0.0"),
        ("edited", "t1-2.0.0 (earlier file)"),
        ("old", "t1-1.0.0 (earlier version)"),
        ("unknown", "t1 (earlier version)"),
    ],
)
def test_rows_of_an_earlier_bundle_are_marked(digest: str, label: str) -> None:
    assert SHIPPED.label("t1", digest) == label


def test_bundle_that_is_named_by_its_id_is_marked() -> None:
    assert SHIPPED.label_id("t1-2.0.0") == "t1-2.0.0"
    assert SHIPPED.label_id("t1-1.0.0") == "t1-1.0.0 (earlier version)"


def test_earlier_bundles_are_named_by_the_provenance_of_results(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    found = {"methods": [{"provenance": {"bundle": "flair-0.1.0", "bundle_sha256": "abc"}}]}
    (tmp_path / "results" / "part.json").write_text(json.dumps(found))
    assert Bundles.load(tmp_path).label("flair", "abc") == "flair-0.1.0 (earlier version)"


def test_record_of_headct_on_patients_of_ct_belongs_to_headct(tmp_path: Path) -> None:
    path = tmp_path / HEADCT_ON_CT_ICH
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"haemorrhage": {"bundle_sha256": "x", "rows": []}}))
    assert Records.load(tmp_path).find("haemorrhage") == [Part("headct", "headct (earlier version)", "x", [])]


# ---- data of the figures -----------------------------------------------------------------------


def test_home_has_the_test_scans_and_the_heads_of_a_scanner_of_the_training() -> None:
    healthy: list[dict[str, Any]] = [
        {"subject": "a", "outcome": "analysed", "false_positive_ml": 0.5},
        {"subject": "b", "outcome": "wrong_field_of_view"},
        {"subject": "c", "outcome": "no_healthy_slice"},
    ]
    groups = home_groups(records(healthy=healthy, heads=[head("i", 2.0, "IXI", in_training=True), head("u", 9.0)]))
    assert [(group.ml, group.refused, group.scans) for group in groups] == [((0.5,), 1, 2), ((2.0,), 0, 1)]


def test_unseen_scanners_leave_out_second_files_and_scanners_of_the_training() -> None:
    heads = [head("p", 1.0, "A"), head("q", 2.0, "B"), head("r", None, "B"), head("s", 4.0, "B")]
    heads += [head("p", 50.0, "A, DICOM", counted=False), head("i", 60.0, "IXI", in_training=True)]
    groups = unseen_groups(records(heads=heads))
    assert [(group.source, group.ml, group.refused) for group in groups] == [("B", (2.0, 4.0), 1), ("A", (1.0,), 0)]
    whole = together(groups)
    assert (whole.scans, whole.percentile(50).value) == (4, 2.0)
    # Three people are too few for an interval.
    assert np.isnan(whole.percentile(50).low)


def test_interval_needs_five_people() -> None:
    group = together(unseen_groups(records(heads=[head(str(ml), float(ml)) for ml in range(5)])))
    found = group.percentile(50)
    assert 0 <= found.low < found.value == 2 < found.high <= 4


def test_dice_of_bright_and_dark_lesions_are_apart() -> None:
    rows = [lesion("a", 0.6), lesion("b", 0.8), lesion("a", 0.2, -0.35)]
    assert inserted_dice(rows, bright=True).value == pytest.approx(0.7)
    assert inserted_dice(rows, bright=False).value == pytest.approx(0.2)


def test_lesions_are_compared_with_home_only_if_one_bundle_measured_both() -> None:
    away = [lesion(s, 0.3, group="not in training", family="intensity") for s in "pq"]
    home = [lesion(s, 0.6) for s in "xy"]
    found = records(unseen_lesions=away, lesions=home)
    (_, dice), (_, detected) = compared_lesions(found)
    assert dice.unseen is not None
    assert dice.home is not None
    assert dice.ratio is not None
    assert detected.ratio is not None
    assert (dice.unseen.value, dice.home.value, dice.ratio.value) == pytest.approx((0.3, 0.6, 0.5))
    assert (detected.unseen_count, detected.ratio.value) == (2, 1.0)
    other = Part("t1", "t1-2.0.0", "old", home)
    assert not compared_lesions(Records(found.evaluation | {("t1", "lesions"): other}, {}, {}, SHIPPED))


def test_refused_scans_with_lesions_have_no_dice_but_their_lesions_are_missed() -> None:
    kind = {"kind": "multiple sclerosis, T1", "outline": "lesions"}
    rows = [
        kind | {"name": "a", "outcome": "analysed", "dice": 0.5, "lesions": [(1.0, True)]},
        kind | {"name": "b", "outcome": "out_of_distribution", "dice": 0.0, "lesions": [(1.0, False)]},
        kind | {"kind": "stroke inserted dark", "name": "c", "outcome": "analysed", "dice": 0.7, "lesions": []},
    ]
    group = outlined_groups(records(pathology=rows))[0]
    assert (group.title, group.dice, group.refused, group.found) == ("multiple sclerosis, T1", (0.5,), 1, (True, False))
    assert real_t1_outcomes(records(pathology=rows)) == ["analysed", "out_of_distribution"]


def haemorrhage() -> Haemorrhage:
    """Return two analysed adults; a refused one and a child are left out."""
    slices = [{"bleeds": ["subdural"], "found_ml": ml} for ml in (3.0, 0.0)]
    clean = [{"bleeds": [], "found_ml": ml} for ml in (0.0, 1.0)]
    rows: list[dict[str, Any]] = [
        {"adult": True, "haemorrhage": True, "outcome": "analysed", "found_ml": 3.0, "dice": 0.4, "slices": slices},
        {"adult": True, "haemorrhage": False, "outcome": "analysed", "found_ml": 1.0, "slices": clean},
        {"adult": True, "haemorrhage": True, "outcome": "wrong_field_of_view"},
        {"adult": False, "haemorrhage": False, "outcome": "analysed", "found_ml": 9.0, "slices": clean},
        {"summary": {"slices_found_by_kind": {}}},
    ]
    return haemorrhage_groups(records(haemorrhage=rows))[0]


def test_haemorrhage_counts_adults() -> None:
    group = haemorrhage()
    assert (group.affected, group.unaffected) == ((3.0,), (1.0,))
    assert (group.refused_affected, group.refused_unaffected) == (1, 0)
    assert group.outlined_dice == (0.4,)
    assert group.slices_with_findings() == (0.5, 0.5)


def test_roc_curve_goes_through_every_threshold() -> None:
    # Volumes with haemorrhage 3 and 0, without 0 and 1. The area is 0.625: two of four pairs in order, one tied.
    false, true = haemorrhage().roc_curve()
    assert list(zip(false, true, strict=True)) == [(0, 0), (0, 0.5), (0.5, 0.5), (1, 1)]
    assert np.trapezoid(true, false) == pytest.approx(0.625)


def test_phases_and_times_come_from_the_benchmarks() -> None:
    benchmarks = {
        "waterfall": {"after": {"phases": {"encode": {"seconds": 1.5, "network": 1.0}}}},
        "volume": {"runs": [{"seconds": 9.0}, {"seconds": 7.0}]},
    }
    found = Records({}, {}, benchmarks, SHIPPED)
    assert [(phase.name, phase.network, phase.other) for phase in phases(found)] == [("encode", 1.0, 0.5)]
    assert warm_seconds(found, "volume") == [7.0]
    assert warm_seconds(found, "ct") == []


def test_close_dots_do_not_cover_each_other() -> None:
    positions = [0.0, 0.0, 0.0, 5.0]
    offsets = figures.swarm(positions, 1.0)
    assert len(set(offsets[:3])) == 3
    assert offsets[0] == offsets[3] == 0.0
    assert max(map(abs, figures.swarm([0.0] * 50, 1.0))) <= figures.SPREAD


# ---- aims and formats --------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "verdict"), [(0.98, "yes"), (0.979, "**no**")])
def test_aim_is_compared_without_rounding(value: float, verdict: str) -> None:
    cells = Aim("a", Limit("≥", 0.98, "%"), "t1", value, "98 %", "50").cells()
    assert cells == ["a", "t1", "98 %", "50", "≥ 98 %", verdict]


def test_aims_with_a_site_profile_are_those_of_held_out_heads() -> None:
    volumes = (4.0 / FACTORS).tolist()
    heads = [head(str(i), 4.0, "IXI", in_training=True, volumes_ml=volumes) for i in range(12)]
    lines = [
        line.split(" | ") for line in make_aims(records(heads=heads)).splitlines() if "with a site profile" in line
    ]
    assert [line[0] for line in lines] == [
        "| with a site profile, IXI: false findings, median",
        "| with a site profile, IXI: false findings, 90th percentile",
    ]
    # Ten equal losses L and a bound of 5 T with T = 0.5 ml: L is at most 0.3 ml.
    assert all(0.25 < float(line[2].split()[0]) <= 0.3 and line[5] == "yes |" for line in lines)


def test_aim_without_measurement_has_no_verdict() -> None:
    assert Aim("a", Limit("<", 15, "s")).cells() == ["a", "", NO_VALUE, "", "< 15 s", ""]
