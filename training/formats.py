"""Intervals and shares as the pages of the evaluation show them."""

import numpy as np
from scipy import stats

from training.cluster_bootstrap import MIN_CLUSTERS, Interval


def show_interval(found: Interval | None) -> str:
    """Format a value with its interval, alone if there is none, and as nothing without a value."""
    if found is None or not np.isfinite(found.value):
        return ""
    value, low, high = (f"{number:.2f}" for number in found)
    return f"{value} ({low} to {high})" if np.isfinite(found.low) and np.isfinite(found.high) else value


def show_share(count: int, total: int) -> str:
    """Format a share, with the exact binomial 95 % interval (Clopper and Pearson 1934) if the total is large enough."""
    text = f"{count} of {total}"
    if total < MIN_CLUSTERS:
        return text
    exact = stats.binomtest(count, total).proportion_ci(method="exact")
    return f"{text} ({100 * exact.low:.0f} to {100 * exact.high:.0f} %)"
