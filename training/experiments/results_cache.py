"""Stored results below docs/results, and whether they are still valid.

A method's result is valid if the data, the split, its training budget and everything in the bundle that decides its
map are the same as now. A new version of a bundle keeps the results that it does not affect. An outcome stores the
score counts of every case, so that a method that is added later is compared on the same bootstrap draws.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from training.config import ROOT
from training.experiments.methods import COUNTERPART, METHOD_INFO, describe_budget
from training.experiments.metrics import (
    IntArray,
    ScoreCounts,
    average_precision,
    best_dice,
    bootstrap_interval,
    mean_interval,
    paired_difference,
)
from training.experiments.results import (
    Choice,
    Gain,
    MethodRun,
    MethodScores,
    Provenance,
    Record,
    RunProvenance,
    ScanScores,
    SegmentationResults,
)

RESULTS = ROOT / "docs" / "results"
# Bins of a stored outcome: AUPRC and Dice change by less than 0.005.
STORED_BINS = 256

RecordT = TypeVar("RecordT", bound=Record)


@dataclass(frozen=True, eq=False)
class Outcome:
    """Result of one method on all cases of a part.

    Attributes
    ----------
    counts : dict of str to ScoreCounts
        Counts for each kind of case. A row is a case.
    scans : dict of str to ScanScores
        Scores for each kind of case.
    choice : Choice
    seconds_per_slice : float
    parameters : int
    """

    counts: dict[str, ScoreCounts]
    scans: dict[str, ScanScores]
    choice: Choice
    seconds_per_slice: float
    parameters: int


def is_valid(stored: Provenance, now: Provenance, method: str = COUNTERPART) -> bool:
    """Return whether a method's stored result would be measured the same way now."""
    hashes = ("data_sha256", "split_sha256", f"{METHOD_INFO[method].depends_on}_sha256")
    if any(getattr(stored, name) != getattr(now, name) for name in hashes):
        return False
    budget = describe_budget(method, now.bundle.rpartition("-")[0])
    return not isinstance(stored, RunProvenance) or stored.training_budget == budget


def load(part: str, kind: type[RecordT]) -> RecordT | None:
    """Load the document of a part; None if it was not measured."""
    path = RESULTS / f"{part}.json"
    return kind.model_validate(json.loads(path.read_text())) if path.exists() else None


def save(part: str, document: Record) -> None:
    """Store the document of a part."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    values = document.model_dump(mode="json", exclude_none=True)
    (RESULTS / f"{part}.json").write_text(json.dumps(values, indent=1) + "\n")


def outcome_path(part: str, method: str) -> Path:
    """Return the file of a method's outcome."""
    return RESULTS / "outcomes" / f"{part}-{method}.npz"


def as_stored(outcome: Outcome) -> Outcome:
    """Return the outcome in the bins that are stored, from which scores are computed."""
    counts = {kind: each.rebin(STORED_BINS) for kind, each in outcome.counts.items()}
    return Outcome(counts, outcome.scans, outcome.choice, outcome.seconds_per_slice, outcome.parameters)


def save_outcome(path: Path, outcome: Outcome, provenance: RunProvenance) -> None:
    """Store an outcome and its provenance."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for kind, counts in as_stored(outcome).counts.items():
        arrays |= {f"positive {kind}": _to_bytes(counts.positive), f"negative {kind}": _to_bytes(counts.negative)}
    facts = {
        "scans": {kind: scans.model_dump() for kind, scans in outcome.scans.items()},
        "choice": outcome.choice.model_dump(),
        "seconds_per_slice": outcome.seconds_per_slice,
        "parameters": outcome.parameters,
        "provenance": provenance.model_dump(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, facts=np.array(json.dumps(facts)), **arrays)


def load_outcome(path: Path) -> tuple[Outcome, RunProvenance]:
    """Load a stored outcome and its provenance."""
    with np.load(path, allow_pickle=False) as stored:
        facts = json.loads(str(stored["facts"]))
        counts = {
            kind: ScoreCounts(_from_bytes(stored[f"positive {kind}"]), _from_bytes(stored[f"negative {kind}"]))
            for kind in facts["scans"]
        }
    scans = {kind: ScanScores.model_validate(values) for kind, values in facts["scans"].items()}
    choice = Choice.model_validate(facts["choice"])
    outcome = Outcome(counts, scans, choice, facts["seconds_per_slice"], facts["parameters"])
    return outcome, RunProvenance.model_validate(facts["provenance"])


def _to_bytes(counts: IntArray) -> npt.NDArray[np.uint8]:
    """Split into byte planes, which compress well: the high bytes are nearly all zero."""
    return np.moveaxis(counts.astype("<u4")[..., None].view(np.uint8), -1, 0)


def _from_bytes(planes: npt.NDArray[np.uint8]) -> IntArray:
    counts = np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view("<u4")[..., 0]
    return counts.astype(np.int64)


def valid_outcomes(part: str, methods: Iterable[str], now: Provenance) -> dict[str, tuple[Outcome, RunProvenance]]:
    """Load the outcomes of a part that are valid, by method."""
    paths = {method: outcome_path(part, method) for method in methods}
    found = {method: load_outcome(path) for method, path in paths.items() if path.exists()}
    return {method: stored for method, stored in found.items() if is_valid(stored[1], now, method)}


def missing_methods(part: str, wanted: Iterable[str], now: Provenance) -> list[str]:
    """Return which of the methods have to run, in their order."""
    wanted = list(wanted)
    valid = valid_outcomes(part, wanted, now)
    return [method for method in wanted if method not in valid]


def score_outcomes(outcomes: dict[str, Outcome]) -> dict[str, dict[str, MethodScores]]:
    """Compute the scores of every method by kind of case, with Counterpart's lead over the others."""
    own = outcomes.get(COUNTERPART)
    scores: dict[str, dict[str, MethodScores]] = {}
    for method, outcome in outcomes.items():
        for kind, counts in outcome.counts.items():
            scans = outcome.scans[kind]
            scores.setdefault(kind, {})[method] = MethodScores(
                auprc=bootstrap_interval(counts, average_precision),
                dice=bootstrap_interval(counts, best_dice),
                cases=len(counts.positive),
                mean_scan_auprc=mean_interval(scans.auprc),
                mean_scan_dice=mean_interval(scans.dice),
                mean_shipped_dice=mean_interval(scans.shipped) if scans.shipped else None,
                lead=gain_of(own.counts[kind], counts) if own is not None and method != COUNTERPART else None,
                scans=scans if method == COUNTERPART else None,
            )
    return scores


def gain_of(first: ScoreCounts, second: ScoreCounts) -> Gain:
    """Return first minus second in AUPRC and best-achievable Dice."""
    return Gain(
        auprc=paired_difference(first, second, average_precision), dice=paired_difference(first, second, best_dice)
    )


def collect(part: str, now: Provenance) -> SegmentationResults:
    """Compute the document of a part from its valid outcomes."""
    outcomes = valid_outcomes(part, METHOD_INFO, now)
    runs = {
        method: MethodRun(
            choice=outcome.choice,
            seconds_per_slice=outcome.seconds_per_slice,
            parameters=outcome.parameters,
            outcome=str(outcome_path(part, method).relative_to(RESULTS)),
            provenance=provenance,
        )
        for method, (outcome, provenance) in outcomes.items()
    }
    kinds = score_outcomes({method: outcome for method, (outcome, _) in outcomes.items()})
    return SegmentationResults(provenance=now, kinds=kinds, methods=runs)
