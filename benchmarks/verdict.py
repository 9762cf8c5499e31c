"""Whether int8 is rightly kept: a rule, and what this run says of it."""

from typing import Any

import numpy as np

from benchmarks.rows import FLOAT32, SERVICE
from benchmarks.statistics import ratio

# Of the time in float32, at most; and how much Dice and AUPRC may fall.
MOST_TIME, MOST_LOST = 0.75, 0.01
RULE = (
    "On a CPU the service's denoiser computes in int8: its convolutions but for those at either end, calibrated on "
    "healthy training slices; what other choices cost: `python -m benchmarks.int8_variants`. "
    f"It is kept only where a whole volume takes at most {MOST_TIME:.0%} of the time in float32, and neither Dice nor "
    f"AUPRC falls by more than {MOST_LOST}."
)
MEASURES = {"dice": "best Dice", "auprc": "AUPRC"}


def int8_verdict(document: dict[str, Any]) -> str:
    """Of the page: the rule and what follows from it, or why nothing does."""
    rows = document["rows"]
    if SERVICE not in rows or FLOAT32 not in rows:
        return "The service was not measured in int8 and in float32 in this run."
    mine, theirs = rows[SERVICE], rows[FLOAT32]
    # Both are measured on the whole volume: nothing is scaled.
    seconds = [[r["seconds"] for r in row["repeats"]] for row in (mine, theirs)]
    share = ratio(seconds[0], seconds[1]).median
    told = [f"{share:.0%} of the time in float32"]
    if mine["accuracy"] is None or theirs["accuracy"] is None:
        return f"{RULE} Here: {told[0]}, accuracy not measured, so nothing is decided."
    falls = {}
    for key, name in MEASURES.items():
        ours, own = (float(np.mean(row["accuracy"][key])) for row in (mine, theirs))
        falls[name] = own - ours
        told.append(f"{name} {ours:.3f} against {own:.3f}")
    told += [_refused(row["accuracy"], name) for row, name in ((mine, "int8"), (theirs, "float32"))]
    missed = ["time"] if share > MOST_TIME else []
    missed += [name for name, fall in falls.items() if fall > MOST_LOST]
    result = f"int8 is **wrongly kept** ({' and '.join(missed)})" if missed else "int8 is **rightly kept**"
    return f"{RULE} Here: {', '.join(filter(None, told))}; {result}."


def _refused(found: dict[str, Any], name: str) -> str:
    """What the gate did, whose ranges are those of int8."""
    count = found["refused"]
    return f"{count} of {len(found['dice'])} cases refused in {name} and counted as empty" if count else ""
