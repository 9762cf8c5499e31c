"""Summaries of measured times: median and range of the repeats, ratios, and scaling of a sample to a volume."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.experiments.markdown import format_interval


@dataclass(frozen=True)
class Summary:
    """Median, smallest and largest of some repeats."""

    value: float
    low: float
    high: float

    @classmethod
    def from_repeats(cls, values: Sequence[float]) -> "Summary":
        """Summarise at least one repeat."""
        return cls(float(np.median(values)), float(min(values)), float(max(values)))


def summarise(values: Sequence[float], digits: int = 2) -> str:
    """Format the median of some repeats with their smallest and largest."""
    return format_interval(Summary.from_repeats(values), digits)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Divide two times repeat by repeat. Repeats are interleaved, so they share disturbances of the machine."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def scale_factor(slices: int, sample: int) -> float:
    """Return the factor from the seconds of a sample of slices to those of all slices.

    Raises
    ------
    ValueError
        The sample is empty or larger than the volume.
    """
    if not 0 < sample <= slices:
        raise ValueError(f"Found a sample of {sample} slices. Expected 1 to {slices}. Change --sample.")
    return slices / sample


def volume_seconds(measured: Mapping[str, Any]) -> list[float]:
    """Return the seconds of a row for a whole volume, one per repeat, with omitted slices and noise levels."""
    return [
        (r["seconds"] + r["loop_seconds"] * (r["stride"] - 1)) * scale_factor(r["slices"], r["sample"])
        for r in measured["repeats"]
    ]


def warm_seconds(measured: Mapping[str, Any]) -> list[float]:
    """Return the seconds from upload to mask, without the first scan, which opens the networks."""
    return [run["seconds"] for run in measured["runs"][1:]]


def seconds_outside_networks(phases: Mapping[str, Mapping[str, float]]) -> float:
    """Return the seconds of a scan in which no network was evaluated."""
    return sum(phase["seconds"] - phase["network"] for phase in phases.values())
