"""Average precision, AUROC, FPR at a sensitivity, best-achievable Dice, and bootstrap intervals over subjects.

Scores are counted in bins for each subject, so a bootstrap draw adds counts instead of sorting pixels again.
Dice of a mask is `app.pipeline.findings.dice`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 2048
# Scores of each class that are sampled to place the bin edges.
EDGE_SAMPLE = 200_000
BOOTSTRAP_DRAWS = 2000
SENSITIVITIES = (0.95, 0.99, 0.999)

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
# Positives and negatives of each score bin in ascending order, (B,) each -> one number.
Statistic = Callable[[IntArray, IntArray], float]


@dataclass(frozen=True)
class Interval:
    """Number with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class ScoreCounts:
    """Histograms of the scores of each subject, by class.

    Attributes
    ----------
    positive, negative : (S, B) ndarray of int
        Scores of each subject in each bin. Bins ascend.
    """

    positive: IntArray
    negative: IntArray

    @classmethod
    def from_scores(cls, scores: Sequence[FloatArray], truths: Sequence[BoolArray]) -> "ScoreCounts":
        """Count the scores of each subject. NaN counts as the lowest score."""
        filled = [np.where(np.isnan(s), -np.inf, s).ravel() for s in scores]
        edges = _bin_edges(filled, truths)
        rows = [
            np.bincount(np.searchsorted(edges, s[t.ravel() == label], side="right"), minlength=len(edges) + 1)
            for label in (True, False)
            for s, t in zip(filled, truths, strict=True)
        ]
        return cls(np.stack(rows[: len(filled)]), np.stack(rows[len(filled) :]))

    def rebin(self, bins: int) -> "ScoreCounts":
        """Merge bins so that each contains about as many positives. The lowest bin stays separate.

        The statistics depend on the negatives above each positive, so a bin ends just below its positives.
        """
        found = self.positive.sum(axis=0)[1:].cumsum()
        group = np.ceil(found / max(found[-1] if found.size else 0, 1) * bins).astype(np.int64)
        starts = np.concatenate([[0], 1 + np.flatnonzero(np.diff(group, prepend=-1))])
        return ScoreCounts(
            np.add.reduceat(self.positive, starts, axis=1), np.add.reduceat(self.negative, starts, axis=1)
        )

    def pooled(self, statistic: Statistic) -> float:
        """Return a statistic over all subjects together."""
        return statistic(self.positive.sum(axis=0), self.negative.sum(axis=0))

    def bootstrap(self, statistic: Statistic, seed: int = 0) -> npt.NDArray[np.float32]:
        """Return a statistic of subjects drawn with replacement, (BOOTSTRAP_DRAWS,). A seed fixes the draws."""
        count = len(self.positive)
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=BOOTSTRAP_DRAWS)
        return np.array([statistic(d @ self.positive, d @ self.negative) for d in draws], dtype=np.float32)


def _bin_edges(scores: Sequence[FloatArray], truths: Sequence[BoolArray]) -> FloatArray:
    rng = np.random.default_rng(0)
    parts = []
    for label in (True, False):
        values = np.concatenate([s[t.ravel() == label] for s, t in zip(scores, truths, strict=True)])
        values = values[np.isfinite(values)]  # infinite scores have separate bins
        if len(values):
            some = rng.choice(values, min(EDGE_SAMPLE, len(values)), replace=False)
            parts.append(np.quantile(some, np.linspace(0, 1, BINS // 2), method="nearest"))
    return np.unique(np.concatenate(parts))


def exact_counts(scores: FloatArray, truth: BoolArray) -> tuple[IntArray, IntArray]:
    """Return the positives and negatives of every distinct score, ascending. NaN counts as the lowest score."""
    values, at = np.unique(np.where(np.isnan(scores), -np.inf, scores), return_inverse=True)
    every = np.bincount(at.ravel(), minlength=len(values))
    positive = np.bincount(at.ravel()[truth.ravel()], minlength=len(values))
    return positive, every - positive


def _cumulative(positive: IntArray, negative: IntArray) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return true and false positives at each threshold, from the highest."""
    return np.cumsum(positive[::-1]).astype(np.float64), np.cumsum(negative[::-1]).astype(np.float64)


def average_precision(positive: IntArray, negative: IntArray) -> float:
    """Return the area under the precision-recall curve (AUPRC) in steps; NaN if there are no positives."""
    true, false = _cumulative(positive, negative)
    if not true[-1]:
        return float("nan")
    precision = true / np.maximum(true + false, 1)
    return float((np.diff(true / true[-1], prepend=0.0) * precision).sum())


def best_dice(positive: IntArray, negative: IntArray) -> float:
    """Return Dice at the best single threshold (best-achievable Dice); NaN if there are no positives."""
    true, false = _cumulative(positive, negative)
    if not true[-1]:
        return float("nan")
    return float((2 * true / (true + false + true[-1])).max())


def auroc(positive: IntArray, negative: IntArray) -> float:
    """Return the area under the ROC curve. Ties count half."""
    true, false = _cumulative(positive, negative)
    x = np.concatenate([[0.0], false / max(false[-1], 1)])
    y = np.concatenate([[0.0], true / max(true[-1], 1)])
    return float(np.trapezoid(y, x))


def fpr_at_sensitivity(sensitivity: float) -> Statistic:
    """Make the statistic: false-positive rate at the highest threshold that reaches a sensitivity."""

    def rate(positive: IntArray, negative: IntArray) -> float:
        true, false = _cumulative(positive, negative)
        at = int(np.argmax(true >= sensitivity * true[-1]))
        return float(false[at] / max(false[-1], 1))

    return rate


def percentile_interval(value: float, draws: Sequence[float] | FloatArray) -> Interval:
    """Return a value with the 95 % percentile interval of its bootstrap draws. NaN draws are ignored."""
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def bootstrap_interval(counts: ScoreCounts, statistic: Statistic) -> Interval:
    """Return a pooled statistic with its interval over subjects."""
    return percentile_interval(counts.pooled(statistic), counts.bootstrap(statistic))


def paired_difference(first: ScoreCounts, second: ScoreCounts, statistic: Statistic) -> Interval:
    """Return first minus second with its interval. Both use the same draws of the same subjects."""
    draws = first.bootstrap(statistic) - second.bootstrap(statistic)
    return percentile_interval(first.pooled(statistic) - second.pooled(statistic), draws)


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean over subjects or scans with its interval. NaN values are left out."""
    data = np.asarray(values, dtype=np.float64)
    data = data[np.isfinite(data)]  # AUPRC of a scan without a lesion is NaN
    draws = np.random.default_rng(seed).integers(len(data), size=(BOOTSTRAP_DRAWS, len(data)))
    return percentile_interval(float(data.mean()), data[draws].mean(axis=1))
