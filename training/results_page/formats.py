"""Numbers and shares as the page shows them."""

import numpy as np
from scipy import stats

from training.cluster_bootstrap import Interval
from training.results_page.groups import MIN_PEOPLE, Healthy

NO_VALUE = "not measured"
# The number of people is not known, because the images of MedNIST have no patient.
STACKS = {"headct": "stacks"}


def show(found: Interval) -> str:
    """Format a value with its interval, alone without one, and as nothing if it is NaN."""
    if not np.isfinite(found.value):
        return ""
    value, low, high = (f"{number:.2f}" for number in found)
    return f"{value} ({low} to {high})" if np.isfinite(found.low) and np.isfinite(found.high) else value


def share(count: int, total: int) -> str:
    """Format a share of scans, with the exact binomial interval if there are enough of them."""
    text = f"{count} of {total}"
    if total < MIN_PEOPLE:
        return text
    exact = stats.binomtest(count, total).proportion_ci(method="exact")
    return f"{text} ({100 * exact.low:.0f} to {100 * exact.high:.0f} %)"


def number_of(group: Healthy) -> str:
    """Return the number of people, or of stacks if the people are not known."""
    return f"{group.scans} {STACKS.get(group.model, '')}".strip()
