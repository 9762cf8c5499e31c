"""Experiments 2 and 3: where the lesion is, by every method on the same slices."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from app.manifest import Manifest
from app.pipeline.findings import dice, label_findings
from app.volume import FloatArray
from training.experiments.cases import Case
from training.experiments.methods import FILTERS, OURS, Maps, Method
from training.experiments.metrics import Counts, average_precision, best_dice, difference, interval, mean_interval

STATISTICS = {"auprc": average_precision, "dice": best_dice}


@dataclass(frozen=True)
class Choice:
    """What of a method was chosen on validation subjects."""

    variant: str
    smoothing: str


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one method made of all cases.

    Attributes
    ----------
    counts : dict of str to Counts
        Of each kind of case; a row is a case.
    per_scan : dict of str to dict of str to list of float
        Of each kind, AUPRC and best Dice of every case, and Dice at the shipped threshold where there is one.
    choice : Choice
    seconds_per_slice : float
    parameters : int
    """

    counts: dict[str, Counts]
    per_scan: dict[str, dict[str, list[float]]]
    choice: Choice
    seconds_per_slice: float
    parameters: int


def judged(values: FloatArray, case: Case) -> FloatArray:
    """A map where it counts; NaN elsewhere."""
    return np.where(case.judged, values, np.float32(np.nan))


def choose(method: Method, cases: Sequence[Case]) -> Choice:
    """The variant and smoothing of the highest AUPRC on validation cases."""
    best, chosen = -1.0, Choice(next(iter(method.variants)), method.smoothing[0])
    if len(method.variants) * len(method.smoothing) == 1:
        return chosen
    for variant, maps in method.variants.items():
        plain = [maps(case) for case in cases]
        for smoothing in method.smoothing:
            found = [judged(FILTERS[smoothing](p), c) for p, c in zip(plain, cases, strict=True)]
            reached = Counts.of(found, [c.truth for c in cases]).statistic(average_precision)
            if reached > best:
                best, chosen = reached, Choice(variant, smoothing)
    return chosen


def run_method(method: Method, validation: Sequence[Case], test: Sequence[Case], manifest: Manifest) -> Outcome:
    """Choose on validation cases, then judge on the test cases."""
    choice = choose(method, validation)
    maps: Maps = method.variants[choice.variant]
    found, seconds = [], 0.0
    for case in tqdm(test, desc=method.name, unit="scan"):
        start = time.perf_counter()
        values = FILTERS[choice.smoothing](maps(case))
        seconds += time.perf_counter() - start
        found.append(judged(values, case))
    counts, scans = {}, {}
    for kind in dict.fromkeys(c.kind for c in test):
        mine = [i for i, c in enumerate(test) if c.kind == kind]
        counts[kind] = Counts.of([found[i] for i in mine], [test[i].truth for i in mine])
        scans[kind] = _per_scan([test[i] for i in mine], counts[kind])
        if method.name == OURS:
            scans[kind]["shipped"] = [shipped_dice(found[i], test[i], manifest) for i in mine]
    each = method.seconds(test) if method.seconds else seconds / sum(len(c.known) for c in test)
    return Outcome(counts, scans, choice, each, method.parameters)


def _per_scan(cases: list[Case], counts: Counts) -> dict[str, list[float]]:
    pairs = list(zip(counts.positive, counts.negative, strict=True))
    return {
        **{name: [of(p, n) for p, n in pairs] for name, of in STATISTICS.items()},
        "truth_pixels": [float(c.truth.sum()) for c in cases],
    }


def shipped_dice(values: FloatArray, case: Case, manifest: Manifest) -> float:
    """Dice of the mask that a map (K, H, W) becomes at the bundle's thresholds."""
    labels, _ = label_findings(values, manifest.residual, manifest.preprocessing.voxel_ml)
    return dice(labels > 0, case.truth)


def table(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """All numbers of an experiment, by kind and method, with ours minus each opponent's."""
    own = outcomes.get(OURS)
    document: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        for kind, counts in outcome.counts.items():
            row: dict[str, Any] = {key: asdict(interval(counts, of)) for key, of in STATISTICS.items()}
            row |= {f"scan_{key}": asdict(mean_interval(v)) for key, v in outcome.per_scan[kind].items()}
            if own is not None and name != OURS:
                ours = own.counts[kind]
                row["behind"] = {key: asdict(difference(ours, counts, of)) for key, of in STATISTICS.items()}
            if name == OURS:
                row["scans"] = outcome.per_scan[kind]
            row["cases"] = len(counts.positive)
            document.setdefault(kind, {})[name] = row
    return document
