"""What the tables say of a method, pooled over test subjects; and how sure that is.

Scores are counted in bins, subject by subject: a bootstrap over subjects then adds counts in place of sorting pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.volume import BoolArray, FloatArray

# Bins of a method's scores, half of them by the quantiles of its scores on lesions.
BINS = 2048
# Pixels of each kind that decide the bins.
SAMPLE = 200_000
BOOTSTRAP = 2000
SENSITIVITIES = (0.95, 0.99, 0.999)

IntArray = npt.NDArray[np.int64]
# Positive and negative counts of each bin, (S, bins) or (bins,) -> one number.
Statistic = Callable[[IntArray, IntArray], float]


@dataclass(frozen=True, eq=False)
class Counts:
    """Scores of some subjects, by whether they should be high.

    Attributes
    ----------
    positive, negative : (S, B) ndarray of int
        Of each subject, how many lie in each bin; bins ascend.
    """

    positive: IntArray
    negative: IntArray

    @classmethod
    def of(cls, scores: Sequence[FloatArray], truths: Sequence[BoolArray]) -> "Counts":
        """Of each subject's scores and what is true of them; NaN is the lowest score."""
        filled = [np.where(np.isnan(s), -np.inf, s).ravel() for s in scores]
        edges = _edges(filled, truths)
        rows = [
            [np.bincount(np.searchsorted(edges, s[t.ravel() == kind], side="right"), minlength=len(edges) + 1)]
            for kind in (True, False)
            for s, t in zip(filled, truths, strict=True)
        ]
        both = np.concatenate(rows)
        return cls(both[: len(filled)], both[len(filled) :])

    def coarse(self, bins: int) -> "Counts":
        """The same in fewer bins, each with about as many of the positives; the lowest bin stays alone.

        What counts is how many negatives lie above each positive: a bin ends right below its positives.
        """
        found = self.positive.sum(axis=0)[1:].cumsum()
        group = np.ceil(found / max(found[-1] if found.size else 0, 1) * bins).astype(np.int64)
        starts = np.concatenate([[0], 1 + np.flatnonzero(np.diff(group, prepend=-1))])
        return Counts(np.add.reduceat(self.positive, starts, axis=1), np.add.reduceat(self.negative, starts, axis=1))

    def statistic(self, of: Statistic) -> float:
        """Over all subjects together."""
        return of(self.positive.sum(axis=0), self.negative.sum(axis=0))

    def resampled(self, of: Statistic, seed: int = 0) -> FloatArray:
        """The same on subjects drawn with replacement, (BOOTSTRAP,); the same draws for the same seed."""
        draws = np.random.default_rng(seed).multinomial(
            len(self.positive), np.full(len(self.positive), 1 / len(self.positive)), size=BOOTSTRAP
        )
        return np.array([of(d @ self.positive, d @ self.negative) for d in draws], dtype=np.float32)


def _edges(scores: Sequence[FloatArray], truths: Sequence[BoolArray]) -> FloatArray:
    rng = np.random.default_rng(0)
    parts = []
    for kind in (True, False):
        values = np.concatenate([s[t.ravel() == kind] for s, t in zip(scores, truths, strict=True)])
        values = values[np.isfinite(values)]  # infinite ones have a bin of their own
        if len(values):
            some = rng.choice(values, min(SAMPLE, len(values)), replace=False)
            parts.append(np.quantile(some, np.linspace(0, 1, BINS // 2), method="nearest"))
    return np.unique(np.concatenate(parts))


def _descending(positive: IntArray, negative: IntArray) -> tuple[FloatArray, FloatArray]:
    """True and false positives at each threshold, from the highest."""
    return np.cumsum(positive[::-1]).astype(np.float64), np.cumsum(negative[::-1]).astype(np.float64)


def average_precision(positive: IntArray, negative: IntArray) -> float:
    """Area under precision over recall, in steps; NaN where nothing is positive."""
    hits, wrong = _descending(positive, negative)
    if not hits[-1]:
        return float("nan")
    precision = hits / np.maximum(hits + wrong, 1)
    return float((np.diff(hits / hits[-1], prepend=0.0) * precision).sum())


def best_dice(positive: IntArray, negative: IntArray) -> float:
    """Dice at the one threshold that suits all these subjects best."""
    hits, wrong = _descending(positive, negative)
    if not hits[-1]:
        return float("nan")
    return float((2 * hits / (hits + wrong + hits[-1])).max())


def auroc(positive: IntArray, negative: IntArray) -> float:
    """Chance that something positive has the higher score; ties count half."""
    hits, wrong = _descending(positive, negative)
    x = np.concatenate([[0.0], wrong / max(wrong[-1], 1)])
    y = np.concatenate([[0.0], hits / max(hits[-1], 1)])
    return float(np.trapezoid(y, x))


def false_positive_rate(sensitivity: float) -> Statistic:
    """Share of the negatives at or above the threshold that finds this share of the positives."""

    def rate(positive: IntArray, negative: IntArray) -> float:
        hits, wrong = _descending(positive, negative)
        at = int(np.argmax(hits >= sensitivity * hits[-1]))
        return float(wrong[at] / max(wrong[-1], 1))

    return rate


@dataclass(frozen=True)
class Interval:
    """A number and its bootstrap 95 % interval."""

    value: float
    low: float
    high: float


def interval(counts: Counts, of: Statistic) -> Interval:
    """Of one method, over subjects."""
    low, high = np.nanpercentile(counts.resampled(of), (2.5, 97.5))
    return Interval(counts.statistic(of), float(low), float(high))


def difference(first: Counts, second: Counts, of: Statistic) -> Interval:
    """How much higher the first one is, on the same subjects, drawn alike."""
    gap = first.resampled(of) - second.resampled(of)
    low, high = np.nanpercentile(gap, (2.5, 97.5))
    return Interval(first.statistic(of) - second.statistic(of), float(low), float(high))


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean over subjects or scans."""
    data = np.asarray(values, dtype=np.float64)
    data = data[np.isfinite(data)]  # a scan without a lesion has no AUPRC
    draws = np.random.default_rng(seed).integers(len(data), size=(BOOTSTRAP, len(data)))
    low, high = np.percentile(data[draws].mean(axis=1), (2.5, 97.5))
    return Interval(float(data.mean()), float(low), float(high))
