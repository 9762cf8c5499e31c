"""What fast means here: bars that were set beforehand, and what this run says of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.rows import (
    ENSEMBLE,
    KNOWN,
    MEMBERS,
    PUBLISHED,
    PUBLISHED_ENSEMBLE,
    PUBLISHED_KNOWN,
    PUBLISHED_KNOWN_ENSEMBLE,
    PUBLISHED_MEMBERS,
    SERVICE,
    TRANSFORMER,
)
from benchmarks.statistics import Summary, ratio, scale_factor

# How many times the service's time the others take, at least, on a whole T1 volume.
FASTER = (
    ("ddim-slice", 20.0, "plain torch, 50 DDIM steps, slice by slice"),
    ("ddim-batch", 8.0, "the same in batches"),
    (TRANSFORMER, 50.0, "the transformer of the experiments, alone"),
    (ENSEMBLE, 50.0, f"the transformer of the experiments, an ensemble of {MEMBERS}"),
    (KNOWN, 50.0, "the transformer of the experiments, alone, known codes fed at once"),
    (PUBLISHED, 50.0, "one of the published size, alone"),
    (PUBLISHED_ENSEMBLE, 50.0, f"one of the published size, an ensemble of {PUBLISHED_MEMBERS}"),
    (PUBLISHED_KNOWN, 50.0, "one of the published size, alone, known codes fed at once"),
    (
        PUBLISHED_KNOWN_ENSEMBLE,
        50.0,
        f"one of the published size, an ensemble of {PUBLISHED_MEMBERS}, known codes fed at once",
    ),
)
MOST_LOST = 0.01
VOLUME_SECONDS, OTHER_SECONDS, CT_SECONDS, CT_BYTES = 15.0, 3.0, 20.0, 1.5e9
HELP_SECONDS, FIRST_SECONDS = 0.5, 2.0


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes
    ----------
    text : str
        What is asked.
    found : str
        What was measured.
    met : bool or None
        None where it was not measured.
    """

    text: str
    found: str = "not measured"
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """In a word."""
        return "-" if self.met is None else "met" if self.met else "**missed**"


def told(summary: Summary, digits: int = 2) -> str:
    """Median, and least to largest."""
    return f"{summary.median:.{digits}f} ({summary.low:.{digits}f} to {summary.high:.{digits}f})"


def volume_seconds(found: dict[str, Any]) -> list[float]:
    """Seconds of a whole volume, repeat by repeat, scaled where a sample of slices and noise levels was measured."""
    return [
        (r["seconds"] + r["loop_seconds"] * (r["every"] - 1)) * scale_factor(r["slices"], r["sample"])
        for r in found["repeats"]
    ]


def warm_seconds(found: dict[str, Any]) -> list[float]:
    """Of uploads to masks, without the first, which opened the networks."""
    return [run["seconds"] for run in found["runs"][1:]]


def other_seconds(phases: dict[str, dict[str, float]]) -> float:
    """Of a scan, without its networks."""
    return sum(p["seconds"] - p["network"] for p in phases.values())


def below(text: str, values: list[float], most: float, unit: str) -> Bar:
    """A bar that the median must stay under."""
    summary = Summary.of(values)
    return Bar(text, f"{told(summary)} {unit}", summary.median < most)


def bars(document: dict[str, Any]) -> list[Bar]:
    """All of them, in the order of the issue that set them."""
    return [*_ratios(document), *_accuracy(document), *_seconds(document), *_start(document)]


def _ratios(document: dict[str, Any]) -> Iterator[Bar]:
    rows = document.get("rows", {})
    for name, least, title in FASTER:
        text = f"whole T1 volume, network and resampling: {title} takes at least {least:.0f} times as long"
        if SERVICE not in rows or name not in rows:
            yield Bar(text)
            continue
        times = ratio(volume_seconds(rows[name]), volume_seconds(rows[SERVICE]))
        yield Bar(text, f"{told(times, 1)} times", times.median >= least)


def _accuracy(document: dict[str, Any]) -> Iterator[Bar]:
    rows = document.get("rows", {})
    for key, name in (("dice", "best-achievable Dice"), ("auprc", "AUPRC")):
        text = f"{name} on synthetic lesions within {MOST_LOST} of the 50 DDIM steps, or better"
        ours, theirs = (rows.get(row, {}).get("accuracy") or {} for row in (SERVICE, "ddim-batch"))
        if key not in ours or key not in theirs:
            yield Bar(text)
            continue
        mine, other = float(np.mean(ours[key])), float(np.mean(theirs[key]))
        yield Bar(text, f"{mine:.3f} against {other:.3f}, {len(ours[key])} lesions", mine >= other - MOST_LOST)


def _seconds(document: dict[str, Any]) -> Iterator[Bar]:
    text = f"a whole T1 volume from upload to mask in under {VOLUME_SECONDS:.0f} s"
    volume, waterfall, ct = (document.get(key) for key in ("volume", "waterfall", "ct"))
    yield below(text, warm_seconds(volume), VOLUME_SECONDS, "s") if volume else Bar(text)
    text = f"of it, from file to results, everything but the networks in under {OTHER_SECONDS:.0f} s"
    yield below(text, [other_seconds(waterfall["after"]["phases"])], OTHER_SECONDS, "s") if waterfall else Bar(text)
    text = f"a CT series of 512 x 512 x 200 from upload to mask in under {CT_SECONDS:.0f} s"
    yield below(text, warm_seconds(ct), CT_SECONDS, "s") if ct else Bar(text)
    text = f"and under {CT_BYTES / 1e9} GB of peak memory, all processes together"
    yield below(text, [ct["peak_bytes"] / 1e9], CT_BYTES / 1e9, "GB") if ct else Bar(text)


def _start(document: dict[str, Any]) -> Iterator[Bar]:
    start = document.get("start")
    for key, most, title in (
        ("help", HELP_SECONDS, "`counterpart --help`"),
        ("scan", FIRST_SECONDS, "`counterpart detect` to the first network evaluation on the scan"),
    ):
        text = f"{title} in under {most:g} s"
        yield below(text, start[key], most, "s") if start else Bar(text)


def bars_table(document: dict[str, Any]) -> list[str]:
    """As a table."""
    lines = ["| bar | measured | |", "| --- | --- | --- |"]
    return [*lines, *(f"| {bar.text} | {bar.found} | {bar.verdict} |" for bar in bars(document))]
