"""Medians, spreads and ratios; and how a sample of slices becomes a whole volume."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Summary:
    """Seconds of several repeats: median, least and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Of at least one repeat."""
        return cls(float(np.median(values)), float(min(values)), float(max(values)))

    def times(self, factor: float) -> "Summary":
        """The same, scaled."""
        return Summary(self.median * factor, self.low * factor, self.high * factor)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Summary:
    """How many times one takes the other's time, repeat by repeat: interleaved repeats share what disturbed them."""
    return Summary.of([a / b for a, b in zip(slow, fast, strict=True)])


def scale_factor(slices: int, sample: int) -> float:
    """What the seconds of a sample are multiplied by for a whole volume; 1 where all was measured.

    Raises
    ------
    ValueError
        The sample is none.
    """
    if not 0 < sample <= slices:
        raise ValueError(f"a sample of {sample} slices was found, expected 1 to {slices}: set --sample")
    return slices / sample


def average_precision(score: npt.NDArray[np.floating], truth: npt.NDArray[np.bool_]) -> float:
    """Area under precision over recall, in steps; equal scores count as one threshold. NaN where there is no truth."""
    flat, hit = np.nan_to_num(score).ravel(), truth.ravel()
    if not hit.any():
        return float("nan")
    order = np.argsort(-flat, kind="stable")
    last = np.append(np.flatnonzero(np.diff(flat[order])), flat.size - 1)  # of each run of equal scores
    hits = np.cumsum(hit[order])[last]
    precision, recall = hits / (last + 1), hits / hit.sum()
    return float((np.diff(recall, prepend=0.0) * precision).sum())
