"""Whether int8 is kept: a rule, and what this run says of it."""

from typing import Any

import numpy as np

from benchmarks.rows import INT8, SERVICE
from benchmarks.statistics import ratio

# Of the service's time, at most; and how much Dice and AUPRC may fall.
MOST_TIME, MOST_LOST = 0.75, 0.01
RULE = (
    "In int8 are the networks' convolutions but for those at either end, calibrated on healthy training slices; what "
    "other choices cost: `python -m benchmarks.int8_variants`. "
    f"It is kept only where a whole volume takes at most {MOST_TIME:.0%} of the time, and neither Dice nor AUPRC falls "
    f"by more than {MOST_LOST}."
)
MEASURES = {"dice": "best Dice", "auprc": "AUPRC"}


def int8_verdict(document: dict[str, Any]) -> str:
    """Of the page: the rule and what follows from it, or why nothing does."""
    rows = document["rows"]
    if SERVICE not in rows or INT8 not in rows:
        return "int8 was not measured beside the service in this run."
    mine, theirs = rows[INT8], rows[SERVICE]
    # Both are measured on the whole volume: nothing is scaled.
    seconds = [[r["seconds"] for r in row["repeats"]] for row in (mine, theirs)]
    share = ratio(seconds[0], seconds[1]).median
    told = [f"{share:.0%} of the service's time"]
    if mine["accuracy"] is None or theirs["accuracy"] is None:
        return f"{RULE} Here: {told[0]}, accuracy not measured, so nothing is decided."
    falls = {}
    for key, name in MEASURES.items():
        ours, own = (float(np.mean(row["accuracy"][key])) for row in (mine, theirs))
        falls[name] = own - ours
        told.append(f"{name} {ours:.3f} against {own:.3f}")
    missed = ["time"] if share > MOST_TIME else []
    missed += [name for name, fall in falls.items() if fall > MOST_LOST]
    result = f"int8 is **not kept** ({' and '.join(missed)})" if missed else "int8 is **kept**"
    return f"{RULE} Here: {', '.join(told)}{_refusals(mine['accuracy'])}; {result}."


def _refusals(found: dict[str, Any]) -> str:
    """What the gate does, whose ranges are those of float32."""
    if not found["refused"]:
        return ""
    told = f", {found['refused']} of {len(found['dice'])} cases refused and counted as empty"
    if (bare := found.get("without_gate")) is not None:
        numbers = ", ".join(f"{name} {np.mean(bare[key]):.3f}" for key, name in MEASURES.items())
        told += f" (without the gate, whose ranges are float32's: {bare['refused']} refused, {numbers})"
    return told
