"""Targets that were set before the benchmark was run, and whether a run meets them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.rows import BY_NAME, FLOAT32, ROWS, SERVICE, TRANSFORMER
from benchmarks.summary import Summary, ratio, seconds_outside_networks, summarise, volume_seconds, warm_seconds

# Least time of the other methods, as a multiple of the service's.
MIN_RATIOS = {"ddim-slice": 20.0, "ddim-batch": 8.0} | {row.name: 50.0 for row in ROWS if row.family == TRANSFORMER}
MAX_INT8_TIME = 0.75
MAX_ACCURACY_LOSS = 0.01
VOLUME_SECONDS, OTHER_SECONDS, CT_SECONDS, CT_GB = 15.0, 3.0, 20.0, 1.5
HELP_SECONDS, START_SECONDS = 0.5, 2.0


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes
    ----------
    text, found : str
        Target and measured value.
    met : bool or None
        None if it was not measured.
    """

    text: str
    found: str = ""
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """The verdict as text."""
        return "not measured" if self.met is None else "met" if self.met else "**missed**"


def compare_targets(document: dict[str, Any]) -> list[Target]:
    """Compare a document with all targets."""
    return [*_speed(document), *_accuracy(document), *_int8(document), *_seconds(document)]


def _speed(document: dict[str, Any]) -> Iterator[Target]:
    rows = document.get("rows", {})
    for name, least in MIN_RATIOS.items():
        text = f"{BY_NAME[name].title}: at least {least:.0f} times Counterpart's time on the T1 volume"
        if SERVICE not in rows or name not in rows:
            yield Target(text)
            continue
        times = ratio(volume_seconds(rows[name]), volume_seconds(rows[SERVICE]))
        yield Target(text, f"{summarise(times, 1)} times", float(np.median(times)) >= least)


def _accuracy(document: dict[str, Any]) -> Iterator[Target]:
    yield from _accuracy_kept(document, "ddim-batch", "the paper's 50 DDIM steps")


def _int8(document: dict[str, Any]) -> Iterator[Target]:
    rows = document.get("rows", {})
    text = f"int8: at most {100 * MAX_INT8_TIME:.0f} % of the time in float32 on the T1 volume"
    if SERVICE in rows and FLOAT32 in rows:
        share = float(np.median(ratio(volume_seconds(rows[SERVICE]), volume_seconds(rows[FLOAT32]))))
        yield Target(text, f"{100 * share:.0f} %", share <= MAX_INT8_TIME)
    else:
        yield Target(text)
    yield from _accuracy_kept(document, FLOAT32, "float32")


def _accuracy_kept(document: dict[str, Any], reference: str, title: str) -> Iterator[Target]:
    """Compare the accuracy of the service with that of a reference row."""
    rows = document.get("rows", {})
    found, expected = (rows.get(row, {}).get("accuracy") or {} for row in (SERVICE, reference))
    for key, name in (("dice", "best-achievable Dice"), ("auprc", "AUPRC")):
        text = f"Synthetic lesions: {name} at most {MAX_ACCURACY_LOSS} below that of {title}"
        if key not in found or key not in expected:
            yield Target(text)
            continue
        ours, theirs = float(np.mean(found[key])), float(np.mean(expected[key]))
        text_found = f"{ours:.3f} against {theirs:.3f} ({len(found[key])} lesions)"
        yield Target(text, text_found, ours >= theirs - MAX_ACCURACY_LOSS)


def _seconds(document: dict[str, Any]) -> Iterator[Target]:
    volume, waterfall, ct, start = (document.get(key) for key in ("volume", "waterfall", "ct", "start"))
    other = waterfall and [seconds_outside_networks(waterfall["after"]["phases"])]
    yield _below("T1 volume from upload to mask", volume and warm_seconds(volume), VOLUME_SECONDS)
    yield _below("T1 volume from file to results, without network evaluations", other, OTHER_SECONDS)
    yield _below("CT series of 512 x 512 x 200 from upload to mask", ct and warm_seconds(ct), CT_SECONDS)
    yield _below("CT series: peak memory of all processes", ct and [ct["peak_bytes"] / 1e9], CT_GB, "GB")
    yield _below("`counterpart --help`", start and start["help"], HELP_SECONDS)
    yield _below("`counterpart detect` to its first network evaluation", start and start["scan"], START_SECONDS)


def _below(what: str, values: Sequence[float] | None, limit: float, unit: str = "s") -> Target:
    """Compare a median with an upper limit."""
    text = f"{what}: under {limit:g} {unit}"
    if not values:
        return Target(text)
    return Target(text, f"{summarise(values)} {unit}", Summary.from_repeats(values).value < limit)
