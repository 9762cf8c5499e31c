"""Bootstrap intervals for measurements that share subjects, lesion shapes, or both.

Lesions of one shape in several subjects are not independent, and neither are several lesions in one subject. The
pigeonhole bootstrap resamples the subjects and the shapes, each as whole clusters and independently of each other. A
measurement gets the product of the two counts as its weight. Its variance is never too small on average, and at most
slightly too large (A. B. Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007, 386-411,
doi:10.1214/07-AOAS122; A. B. Owen and D. Eckles, Bootstrapping data arrays of arbitrary order, 2012, arXiv 1106.2125).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

DRAWS = 2000
# With fewer clusters, resampling them gives no useful interval.
MIN_CLUSTERS = 5
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
# Counts of n measurements in each draw, (draws, n) -> value of each draw, (draws,).
Statistic = Callable[[IntArray], FloatArray]


class Interval(NamedTuple):
    """Value with its 95 % interval."""

    value: float
    low: float
    high: float


def cluster_weights(
    labels: Sequence[str], strata: Sequence[str] | None = None, *, seed: int, draws: int = DRAWS
) -> IntArray:
    """Count how often the cluster of each measurement is drawn in each resample of the clusters.

    Parameters
    ----------
    labels : sequence of str
        Cluster of each of n measurements.
    strata : sequence of str, optional
        Group of each measurement. The clusters of a group are resampled among themselves.
    seed : int
        Independent factors need different seeds.

    Returns
    -------
    (draws, n) ndarray of int
    """
    rng = np.random.default_rng(seed)
    groups = np.asarray(strata if strata is not None else [""] * len(labels))
    names = np.asarray(labels)
    weights = np.zeros((draws, len(names)), np.int64)
    for group in np.unique(groups):
        clusters, of = np.unique(names[groups == group], return_inverse=True)
        counts = rng.multinomial(len(clusters), np.full(len(clusters), 1 / len(clusters)), size=draws)
        weights[:, groups == group] = counts[:, of]
    return weights


def crossed_weights(subjects: Sequence[str], shapes: Sequence[str], groups: Sequence[str] | None = None) -> IntArray:
    """Return the weights of the pigeonhole bootstrap, (draws, n).

    Subjects are resampled within their group. Groups share the shapes, so that a ratio of two groups contains the same
    shapes.
    """
    return cluster_weights(subjects, groups, seed=0) * cluster_weights(shapes, seed=1)


def interval(statistic: Statistic, weights: IntArray) -> Interval:
    """Return a statistic of all measurements with its percentile interval over the draws (draws, n).

    Draws without a value are left out, for example a draw without any measurement of a group. If no draw has a value,
    the interval is NaN.
    """
    value = float(statistic(np.ones((1, weights.shape[1]), np.int64))[0])
    draws = statistic(weights)
    draws = draws[np.isfinite(draws)]
    low, high = np.percentile(draws, (2.5, 97.5)) if draws.size else (np.nan, np.nan)
    return Interval(value, float(low), float(high))


def quantile(values: Sequence[float], percent: float = 50.0) -> Statistic:
    """Return a statistic: a percentile, by default the median, as `numpy.percentile` of the repeated values.

    It is NaN if all counts are 0.
    """
    order = np.argsort(values, kind="stable")
    data = np.asarray(values, np.float64)[order]

    def of(counts: IntArray) -> FloatArray:
        ends = counts[:, order].cumsum(axis=1)
        position = percent / 100 * np.maximum(ends[:, -1] - 1, 0)
        low, high = (data[(ends <= side(position)[:, None]).sum(axis=1) % len(data)] for side in (np.floor, np.ceil))
        return np.where(ends[:, -1] > 0, low + (position - np.floor(position)) * (high - low), np.nan)

    return of


def mean(values: Sequence[float]) -> Statistic:
    """Return a statistic: the mean. It is NaN if all counts are 0."""
    data = np.asarray(values, np.float64)

    def of(counts: IntArray) -> FloatArray:
        totals = counts.sum(axis=1)
        return np.where(totals > 0, counts @ data / np.maximum(totals, 1), np.nan)

    return of


def ratio(first: Statistic, second: Statistic, is_first: Sequence[bool]) -> Statistic:
    """Return a statistic: the first statistic of its measurements, divided by the second one of the others.

    It is NaN if the second one is 0.
    """
    chosen = np.asarray(is_first, np.bool_)

    def of(counts: IntArray) -> FloatArray:
        below = second(counts[:, ~chosen])
        quotient: FloatArray = np.divide(
            first(counts[:, chosen]), below, out=np.full(len(counts), np.nan), where=below > 0
        )
        return quotient

    return of
