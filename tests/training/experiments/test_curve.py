"""Points are the bundle's manifest with other choices, and the knee is where more evaluations stop to pay."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from app.manifest import Manifest
from app.pipeline.networks import Networks
from training.config import ROOT
from training.experiments import curve
from training.experiments.cases import Case
from training.experiments.pages import curve_section, knee

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    folder = next((ROOT / "models").glob("t1-*"))
    return Manifest.model_validate_json((folder / "manifest.json").read_text())


def test_a_point_changes_views_levels_and_steps_alone(manifest: Manifest) -> None:
    asked: list[tuple[int, ...]] = []

    def threshold(levels: tuple[int, ...]) -> float:
        asked.append(levels)
        return 0.5

    own = curve.shipped(manifest)
    assert curve.changed(manifest, own, threshold) == manifest
    assert not asked, "the bundle's own threshold is for its own noise levels"
    made = curve.changed(manifest, curve.Point(1, (5, 20), (200, 50)), threshold)
    assert asked == [(5, 20)]
    assert (made.kl.timesteps, made.kl.threshold, made.reverse.timesteps) == ((5, 20), 0.5, (200, 50))
    assert made.views == manifest.views[:1]
    assert made.kl.alpha_bar[0] > made.kl.alpha_bar[1] > 0.9
    restored = {"views": manifest.views, "kl": manifest.kl, "reverse": manifest.reverse}
    assert made.model_copy(update=restored) == manifest


def test_what_a_bundle_does_is_a_point_of_the_curve(manifest: Manifest) -> None:
    assert curve.shipped(manifest) in curve.POINTS
    assert len(set(curve.POINTS)) == len({p.label for p in curve.POINTS}) == len(curve.POINTS)


def test_evaluations_are_counted_by_slices() -> None:
    counting = curve.Counting(Networks(lambda x: x, lambda z, _: 2 * z, lambda z: z))
    z = np.ones((5, 3, 2, 2), np.float32)
    assert counting.networks.denoise(z, np.zeros(5, np.int64))[0, 0, 0, 0] == 2
    counting.networks.denoise(z[:2], np.zeros(2, np.int64))
    assert counting.evaluations == 7


def test_cases_are_spread_over_subjects_and_grades() -> None:
    empty: Any = None
    none = np.zeros((0, 1, 1), bool)
    plain = Case("", "", empty, empty, np.zeros(0, np.int64), none, none)
    kinds = ("grade 1", *curve.KINDS)
    every = [replace(plain, subject=str(i), kind=kind) for kind in kinds for i in range(29)]
    chosen = curve.chosen_cases(every, 8)
    assert [c.kind for c in chosen] == ["grade 2"] * 4 + ["grade 3"] * 4
    for kind in curve.KINDS:
        assert len({c.subject for c in chosen if c.kind == kind}) == 4
    assert chosen == curve.chosen_cases(every, 8)


def row(evaluations: float, dice: float, auprc: float) -> dict[str, Any]:
    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value, "high": value}

    of = {"evaluations_per_slice": evaluations, "dice": interval(dice), "auprc": interval(auprc)}
    told = {"seconds_per_slice": 0.1, "cases": 6, "provenance": {"code": "abc"}}
    return of | told | {"views": 1, "kl": [10], "reverse": [20]}


POINTS = {
    "two": row(2, 0.50, 0.60),
    "six": row(6, 0.594, 0.593),
    "twelve": row(12, 0.60, 0.6),
    "more": row(36, 0.6, 0.59),
}


def test_the_knee_is_the_fewest_evaluations_that_are_as_good() -> None:
    assert knee(POINTS) == "six"
    # None is close in both: the one that lacks the least.
    assert knee({"a": row(2, 0.5, 0.6), "b": row(4, 0.57, 0.55), "c": row(8, 0.6, 0.4)}) == "b"


def test_the_page_says_where_the_knee_is() -> None:
    hashes = dict.fromkeys(("bundle_sha256", "detection_sha256", "split_sha256", "data_sha256"), "0" * 64)
    p = {"bundle": "t1-9.9.9", "split": "s.json", "seed": 1, "code": "abc", "threads": 1, **hashes}
    page = "\n".join(curve_section({"bundles": {"t1": {"provenance": p, "shipped": "twelve", "points": POINTS}}}))
    assert "**t1-9.9.9**: the knee is at 6.0 evaluations a slice (six): Dice 0.59, AUPRC 0.59." in page
    assert "The bundle asks for 12.0: Dice 0.60, AUPRC 0.60." in page
    at = {"t1": {"provenance": p, "shipped": "six", "points": POINTS}}
    assert "That is what the bundle does." in "\n".join(curve_section({"bundles": at}))
    assert curve_section(None) == []
