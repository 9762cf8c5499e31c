"""Stored outcomes, and when they are valid."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from training.experiments import metrics, results_cache
from training.experiments.methods import COUNTERPART, METHOD_INFO, describe_budget
from training.experiments.metrics import ScoreCounts, average_precision, best_dice, paired_difference
from training.experiments.results import Choice, Provenance, RunProvenance, ScanScores, SegmentationResults
from training.experiments.results_cache import Outcome

pytestmark = pytest.mark.training

HASHES = ("bundle", "cases", "codes", "detection", "data", "split")
NOW = Provenance(
    bundle="t1-9", split="s.json", seed=1, code="abc", threads=1, **{f"{name}_sha256": "a" * 64 for name in HASHES}
)
NAMES = (COUNTERPART, "intensity", "vae", "transformer")
MAX_BYTES = 20_000


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results_cache, "RESULTS", tmp_path)
    monkeypatch.setattr(metrics, "BOOTSTRAP_DRAWS", 50)
    return tmp_path


def make_outcome(lift: float, scans: int = 6, pixels: int = 20_000) -> Outcome:
    rng = np.random.default_rng(3)
    truths = [rng.random(pixels) < 0.01 for _ in range(scans)]
    scores = [rng.normal(t * lift, 1).astype(np.float32) for t in truths]
    for values in scores:
        values[: pixels // 2] = np.nan  # outside of the head
    scan_scores = ScanScores(auprc=(0.5,) * scans, dice=(0.4,) * scans, truth_pixels=(9.0,) * scans)
    counts = {"grade 2": ScoreCounts.from_scores(scores, truths)}
    return Outcome(counts, {"grade 2": scan_scores}, Choice(variant="bright", smoothing="as it is"), 0.01, 7)


def run_provenance(method: str, **changes: Any) -> RunProvenance:
    budget = describe_budget(method, "t1")
    return RunProvenance(**(NOW.model_dump() | {"total_seconds": 9.0, "training_budget": budget} | changes))


def store(*names: str) -> None:
    for i, name in enumerate(names):
        path = results_cache.outcome_path("shapes", name)
        results_cache.save_outcome(path, make_outcome(3.0 - i), run_provenance(name))


@pytest.mark.parametrize("lift", [0.3, 1.5, 3.0])
def test_stored_bins_keep_the_statistics(lift: float) -> None:
    counts = make_outcome(lift).counts["grade 2"]
    coarse = counts.rebin(results_cache.STORED_BINS)
    assert coarse.positive.shape[1] <= results_cache.STORED_BINS + 2 < counts.positive.shape[1]
    assert np.array_equal(coarse.positive.sum(axis=1), counts.positive.sum(axis=1))
    assert np.array_equal(coarse.negative[:, 0], counts.negative[:, 0])
    for statistic in (average_precision, best_dice):
        assert coarse.pooled(statistic) == pytest.approx(counts.pooled(statistic), abs=0.005)
        assert coarse.bootstrap(statistic) == pytest.approx(counts.bootstrap(statistic), abs=0.005)


def test_outcome_is_restored_from_a_small_file() -> None:
    made = make_outcome(1.5, scans=28, pixels=35 * 64 * 64)
    path = results_cache.outcome_path("ellipses", "vae")
    results_cache.save_outcome(path, made, run_provenance("vae"))
    assert path.stat().st_size < MAX_BYTES
    found, provenance = results_cache.load_outcome(path)
    assert provenance == run_provenance("vae")
    assert (found.choice, found.parameters, found.seconds_per_slice) == (made.choice, 7, 0.01)
    assert found.scans == made.scans
    stored = results_cache.as_stored(made).counts["grade 2"]
    assert np.array_equal(found.counts["grade 2"].positive, stored.positive)
    assert np.array_equal(found.counts["grade 2"].negative, stored.negative)


def test_document_pairs_every_method_with_counterpart() -> None:
    store(*NAMES)
    document = results_cache.collect("shapes", NOW)
    results_cache.save("shapes", document)
    assert results_cache.load("shapes", SegmentationResults) == document
    rows = document.kinds["grade 2"]
    assert set(rows) == set(NAMES)
    own, other = (results_cache.as_stored(make_outcome(lift)).counts["grade 2"] for lift in (3.0, 2.0))
    lead = rows["intensity"].lead
    assert lead is not None
    assert lead.auprc == paired_difference(own, other, average_precision)
    assert rows[COUNTERPART].lead is None
    assert document.methods["vae"].outcome == "outcomes/shapes-vae.npz"


@pytest.mark.parametrize(
    ("hashes", "valid"),
    [
        (["bundle"], NAMES),
        (["detection"], NAMES[1:]),
        (["detection", "codes"], ("intensity", "vae")),
        (["detection", "codes", "cases"], ()),
        (["data"], ()),
        (["split"], ()),
    ],
)
def test_result_is_valid_while_what_decides_it_is_the_same(hashes: list[str], valid: tuple[str, ...]) -> None:
    store(*NAMES)
    now = NOW.model_copy(update={f"{name}_sha256": "b" * 64 for name in hashes})
    assert results_cache.missing_methods("shapes", NAMES, now) == [n for n in NAMES if n not in valid]
    document = results_cache.collect("shapes", now)
    assert set(document.methods) == set(valid)
    has_own = COUNTERPART in valid
    leads = [row.lead for rows in document.kinds.values() for name, row in rows.items() if name != COUNTERPART]
    assert all((lead is not None) == has_own for lead in leads)


def test_another_training_budget_is_not_valid() -> None:
    other = describe_budget("transformer", "flair")
    assert other != describe_budget("transformer", "t1")
    assert not results_cache.is_valid(run_provenance("transformer", training_budget=other), NOW, "transformer")
    assert results_cache.is_valid(run_provenance("transformer"), NOW, "transformer")


def test_stored_documents_name_their_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for part in ("ellipses", "shapes", "tumours", "ms-t1", "stripped"):
        document = results_cache.load(part, SegmentationResults)
        assert document is not None
        assert set(document.methods) == set(METHOD_INFO)
        for name, run in document.methods.items():
            assert run.outcome == f"outcomes/{part}-{name}.npz"
            assert results_cache.load_outcome(results_cache.RESULTS / run.outcome)[1] == run.provenance
