"""Comparison of inserted lesions on scanners that no training saw with those at home."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from training.cluster_bootstrap import Interval, Statistic, crossed_weights, interval, ratio
from training.evaluate_unseen import FOREIGN_PATCH, HOME, INTENSITY, UNSEEN

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Compared:
    """Statistic on scanners that no training saw and at home, with the number of measurements, and the ratio.

    An interval is None if its group has no measurement, and the ratio is None without both.
    """

    unseen: Interval | None
    unseen_count: int
    home: Interval | None
    home_count: int
    ratio: Interval | None


@dataclass(frozen=True)
class Cases:
    """Measurements of one kind with their clusters, from both groups."""

    values: list[float]
    subjects: list[str]
    shapes: list[str]
    groups: list[str]

    @classmethod
    def of(cls, rows: Rows, key: str) -> "Cases":
        """Return one measurement of each row that has it."""
        rows = [row for row in rows if key in row]
        columns = ([row[name] for row in rows] for name in (key, "subject", "shape", "group"))
        return cls(*columns)

    @classmethod
    def of_lesions(cls, rows: Rows, chosen: Callable[[float], bool] = lambda _: True) -> "Cases":
        """Return whether each connected lesion of some volume is found, as 0 or 1."""
        found = [(float(hit), row) for row in rows for ml, hit in row.get("lesions", ()) if chosen(ml)]
        return cls(
            [hit for hit, _ in found], *([row[name] for _, row in found] for name in ("subject", "shape", "group"))
        )

    def compare(self, statistic: Callable[[Sequence[float]], Statistic]) -> Compared:
        """Compare a statistic of both groups. Intervals resample subjects and shapes."""
        weights = crossed_weights(self.subjects, self.shapes, self.groups)
        unseen = np.array([group == UNSEEN for group in self.groups], np.bool_)
        values = np.array(self.values)
        first, second = (statistic(values[chosen].tolist()) for chosen in (unseen, ~unseen))
        counts = int(unseen.sum()), int((~unseen).sum())
        return Compared(
            interval(first, weights[:, unseen]) if counts[0] else None,
            counts[0],
            interval(second, weights[:, ~unseen]) if counts[1] else None,
            counts[1],
            interval(ratio(first, second, unseen.tolist()), weights) if all(counts) else None,
        )


def both_groups(unseen: Rows, home: Rows) -> Rows:
    """Return the rows of the part `unseen_lesions`, and those of the part `lesions` with the same contrasts.

    The part `unseen_lesions` also has foreign patches at home.
    """
    contrasts = {row["contrast"] for row in unseen}
    at_home = [{**row, "group": HOME, "family": INTENSITY} for row in home if row["contrast"] in contrasts]
    return [row for row in unseen if row["family"] in (INTENSITY, FOREIGN_PATCH)] + at_home


def families(rows: Rows) -> list[tuple[str, Rows]]:
    """Return the rows of each contrast, of both contrasts, and of foreign patches, with their titles."""
    contrasts = sorted({row["contrast"] for row in rows if row["family"] == INTENSITY}, reverse=True)
    found = [(f"c = {c:+.2f}", [row for row in rows if row["contrast"] == c]) for c in contrasts]
    found.append(("both signs", list(chain.from_iterable(chosen for _, chosen in found))))
    patches = [row for row in rows if row["family"] == FOREIGN_PATCH]
    return [*found, ("foreign patches", patches)] if patches else found
