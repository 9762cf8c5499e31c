"""What was measured stays, is paired with what comes later, and counts for its own bundle alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from training.experiments import kept, metrics
from training.experiments.metrics import Counts, average_precision, best_dice, difference
from training.experiments.opponents import budget
from training.experiments.segmentation import Choice, Outcome

pytestmark = pytest.mark.training

HASHES = dict.fromkeys(("cases_sha256", "codes_sha256", "detection_sha256"), "a" * 64)
NOW = {
    **dict.fromkeys(("bundle_sha256", "split_sha256", "data_sha256"), "a" * 64),
    **HASHES,
    "bundle": "t1-9",
    "seed": 1,
    "code": "abc",
    "threads": 1,
}
NAMES = ("counterpart", "intensity", "vae", "transformer")
MAX_BYTES = 60_000


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    monkeypatch.setattr(metrics, "BOOTSTRAP", 50)
    return tmp_path


def outcome(lift: float, scans: int = 6, pixels: int = 20_000, kinds: tuple[str, ...] = ("grade 2",)) -> Outcome:
    rng = np.random.default_rng(3)
    counts = {}
    for kind in kinds:
        truths = [rng.random(pixels) < 0.01 for _ in range(scans)]
        scores = [rng.normal(t * lift, 1).astype(np.float32) for t in truths]
        for values in scores:
            values[: pixels // 2] = np.nan  # beside the head
        counts[kind] = Counts.of(scores, truths)
    per_scan = {kind: {"auprc": [0.5] * scans, "dice": [0.4] * scans} for kind in kinds}
    return Outcome(counts, per_scan, Choice("bright", "as it is"), 0.01, 7)


def document(*names: str) -> dict[str, Any]:
    """As the runner wrote them before rows had a provenance."""
    row = {"auprc": {"value": 0.11, "low": 0.1, "high": 0.12}, "behind": {"auprc": {"value": 0.5}}, "cases": 6}
    facts = {"choice": {"variant": "", "smoothing": 0.0}, "seconds_per_slice": 0.5, "parameters": 3}
    return {
        "provenance": NOW | {"code": "older"},
        "kinds": {"grade 2": dict.fromkeys(names, row)},
        "methods": dict.fromkeys(names, facts),
    }


@pytest.mark.parametrize("lift", [0.3, 1.5, 3.0])
def test_fewer_bins_say_the_same(lift: float) -> None:
    counts = outcome(lift).counts["grade 2"]
    coarse = counts.coarse(kept.STORED_BINS)
    assert coarse.positive.shape[1] <= kept.STORED_BINS + 2 < counts.positive.shape[1]
    assert np.array_equal(coarse.positive.sum(axis=1), counts.positive.sum(axis=1))
    assert np.array_equal(coarse.negative[:, 0], counts.negative[:, 0]), "what was not judged stays apart"
    for of in (average_precision, best_dice):
        assert coarse.statistic(of) == pytest.approx(counts.statistic(of), abs=0.005)
        drawn = [each.resampled(of) for each in (counts, coarse)]
        assert drawn[1] == pytest.approx(drawn[0], abs=0.005), "on every draw of the bootstrap"


def test_an_outcome_comes_back_and_is_small(results: Path) -> None:
    """As many scans as `sprites` has, at its size; one kind of three."""
    made = outcome(1.5, scans=28, pixels=35 * 64 * 64)
    path = kept.outcome_path("sprites", "vae")
    kept.save_outcome(path, made, NOW)
    assert path.parent == results / "outcomes"
    assert path.stat().st_size < MAX_BYTES / 3
    found, provenance = kept.load_outcome(path)
    assert provenance == NOW
    assert (found.choice, found.parameters, found.seconds_per_slice) == (Choice("bright", "as it is"), 7, 0.01)
    assert found.per_scan == made.per_scan
    for kind, counts in kept.as_stored(made).counts.items():
        assert np.array_equal(found.counts[kind].positive, counts.positive)
        assert np.array_equal(found.counts[kind].negative, counts.negative)


def test_rows_without_an_outcome_stay_and_a_new_method_is_paired(results: Path) -> None:
    (results / "shapes.json").write_text(json.dumps(document("counterpart", "intensity")))
    kept.save_outcome(kept.outcome_path("shapes", "counterpart"), outcome(3.0), NOW)
    kept.save_outcome(kept.outcome_path("shapes", "transformer"), outcome(1.0), NOW | {"whole_seconds": 9.0})
    found = kept.merged("shapes", NAMES, NOW)
    rows = found["kinds"]["grade 2"]
    assert list(rows) == ["counterpart", "intensity", "transformer"]
    assert rows["intensity"]["behind"]["auprc"]["value"] == 0.5, "as it was written then"
    own, other = (kept.as_stored(outcome(lift)).counts["grade 2"] for lift in (3.0, 1.0))
    gap = difference(own, other, average_precision)
    assert rows["transformer"]["behind"]["auprc"]["value"] == pytest.approx(gap.value)
    assert rows["counterpart"]["auprc"]["value"] == own.statistic(average_precision) > 0.3, (
        "what has an outcome is computed from it"
    )
    told = {name: facts["provenance"] for name, facts in found["methods"].items()}
    assert told["intensity"] == {"seed": 1, "code": "older", "threads": 1, **HASHES}
    assert told["transformer"] == {"seed": 1, "code": "abc", "threads": 1, **HASHES, "whole_seconds": 9.0}
    assert found["methods"]["transformer"]["outcome"] == "outcomes/shapes-transformer.npz"
    assert "outcome" not in found["methods"]["intensity"]


@pytest.mark.parametrize("key", kept.SAME)
def test_nothing_counts_for_other_data_or_another_split(results: Path, key: str) -> None:
    (results / "shapes.json").write_text(json.dumps(document("intensity")))
    kept.save_outcome(kept.outcome_path("shapes", "vae"), outcome(1.0), NOW)
    now = NOW | {key: "b" * 64}
    assert kept.merged("shapes", NAMES, now) == {"kinds": {}, "methods": {}}
    assert kept.missing("shapes", [], NAMES, now, "counterpart") == list(NAMES)


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        (["detection_sha256"], ["intensity", "vae", "transformer"]),
        (["detection_sha256", "codes_sha256"], ["intensity", "vae"]),
        (["detection_sha256", "codes_sha256", "cases_sha256"], []),
    ],
    ids=["denoiser", "VQ-VAE", "slices"],
)
@pytest.mark.parametrize("outcomes", [True, False])
def test_a_row_counts_while_what_decides_it_does(
    results: Path, changed: list[str], left: list[str], *, outcomes: bool
) -> None:
    (results / "shapes.json").write_text(json.dumps(document(*NAMES)))
    for name in NAMES if outcomes else ():
        kept.save_outcome(kept.outcome_path("shapes", name), outcome(1.0), NOW)
    now = NOW | dict.fromkeys(changed, "b" * 64)
    assert kept.missing("shapes", [], NAMES, now, "counterpart") == [n for n in NAMES if n not in left]
    found = kept.merged("shapes", NAMES, now)
    assert list(found["methods"]) == left
    rows = found["kinds"].get("grade 2", {})
    assert list(rows) == left
    assert not any("behind" in row for row in rows.values()), "of a map that is not this bundle's"


def test_rows_outlive_a_version_that_finds_the_same(results: Path) -> None:
    (results / "shapes.json").write_text(json.dumps(document("intensity")))
    kept.save_outcome(kept.outcome_path("shapes", "vae"), outcome(1.0), NOW)
    later = NOW | {"bundle": "t1-9.1", "bundle_sha256": "b" * 64}
    assert list(kept.merged("shapes", NAMES, later)["methods"]) == ["intensity", "vae"]


def test_what_runs_is_what_is_missing(results: Path) -> None:
    (results / "shapes.json").write_text(json.dumps(document("counterpart", "intensity", "vae")))
    # Whoever is new is compared with ours, whose outcome is lost.
    assert kept.missing("shapes", [], NAMES, NOW, "counterpart") == ["counterpart", "transformer"]
    assert kept.missing("shapes", ["vae"], NAMES, NOW, "counterpart") == ["counterpart", "vae"]
    kept.save_outcome(kept.outcome_path("shapes", "counterpart"), outcome(3.0), NOW)
    wanted = ["counterpart", "transformer"]
    assert kept.missing("shapes", wanted, NAMES, NOW, "counterpart") == ["transformer"]
    kept.save_outcome(kept.outcome_path("shapes", "transformer"), outcome(1.0), NOW)
    assert kept.missing("shapes", [], NAMES, NOW, "counterpart") == []


def test_a_row_of_an_opponent_with_another_budget_does_not_count() -> None:
    other = budget("transformer", "flair")
    assert other != budget("transformer", "t1")
    rows = {"transformer": {"learnt_from": other}, "vae": {"learnt_from": budget("vae", "t1")}, "mean": {}}
    document = {
        "provenance": {"seed": 1, "bundle": "t1-9"},
        "methods": {name: {"provenance": {"seed": 1, **told}} for name, told in rows.items()},
        "kinds": {"grade 2": {name: {"cases": 3} for name in rows}},
    }
    counted = kept.current_rows(document)
    assert set(counted["methods"]) == {"vae", "mean"}
    assert counted["kinds"] == {"grade 2": {"vae": {"cases": 3}, "mean": {"cases": 3}}}
