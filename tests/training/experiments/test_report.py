"""The page of stored results."""

from pathlib import Path

import pytest

from training.experiments import report, results_cache
from training.experiments.metrics import Interval
from training.experiments.report import find_knee
from training.experiments.results import PointScores


def point(evaluations: float, dice: float, auprc: float) -> PointScores:
    scores = {"dice": Interval(dice, dice, dice), "auprc": Interval(auprc, auprc, auprc)}
    setting = {"views": 1, "kl": (10,), "reverse": (20,), "kl_threshold": 0.1}
    cost = {"evaluations_per_slice": evaluations, "seconds_per_slice": 0.1, "cases": 6, "code": "abc"}
    return PointScores.model_validate(scores | setting | cost)


def test_knee_is_the_fewest_evaluations_that_are_as_good() -> None:
    points = {
        "two": point(2, 0.50, 0.60),
        "six": point(6, 0.594, 0.593),
        "twelve": point(12, 0.60, 0.6),
        "more": point(36, 0.6, 0.59),
    }
    assert find_knee(points) == "six"
    # If no setting is close in both, the one with the smallest shortfall is chosen.
    assert find_knee({"a": point(2, 0.5, 0.6), "b": point(4, 0.57, 0.55), "c": point(8, 0.6, 0.4)}) == "b"


def test_committed_page_is_the_page_of_the_stored_results(tmp_path: Path) -> None:
    report.write(tmp_path / "comparison.md")
    assert (tmp_path / "comparison.md").read_text() == report.PAGE.read_text()


def test_page_is_written_without_any_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_cache, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "EVALUATION", tmp_path)
    report.write(tmp_path / "comparison.md")
    assert report.NOT_MEASURED in (tmp_path / "comparison.md").read_text()
