"""Tables of the page, from the JSON: what was not measured stays empty."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.bars import other_seconds, told, volume_seconds, warm_seconds
from benchmarks.profile import IN_INT8
from benchmarks.rows import ROWS, SERVICE, TRANSFORMER, Row, kind_of
from benchmarks.statistics import Summary, ratio
from benchmarks.trace import ORDER, RECEIVE

NOTHING = "-"
# Operators below this share of a network's time are one line.
LEAST_SHARE = 0.03
# A kind of operator that reaches this share of a ceiling is bound by it.
BOUND = 0.5


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *(f"| {' | '.join(line)} |" for line in lines)]


def ceilings(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median of each kind."""
    return {kind: float(np.median([one[kind] for one in measured])) for kind in ("float32", "int8")}


def slice_gigaflops(found: dict[str, Any], costs: dict[str, float]) -> float:
    """Thousand million operations of the networks, a slice."""
    last = found["repeats"][-1]
    return float(sum(_asked(last, name) * costs[name] for name in last["counts"]) / last["sample"])


def _asked(repeat: dict[str, Any], network: str) -> int:
    """How many slices a network was asked for, with the noise levels that were left out."""
    count: int = repeat["counts"].get(network, 0)
    return count * repeat["every"] if network == "denoise" else count


def main_table(document: dict[str, Any]) -> list[str]:
    """One line a method."""
    heads = (
        "method", "whole T1 volume, s", "times the service", "slice, ms", "measured on", "CT series, s",
        "evaluations a slice", "GFLOP a slice", "GFLOP/s", "of float32 ceiling", "of int8 ceiling", "peak memory, MB",
        "cold start, s", "best Dice", "AUPRC",
    )  # fmt: skip
    return table(heads, [_line(row, document) for row in ROWS if row.name in document["rows"]])


def _line(row: Row, document: dict[str, Any]) -> list[str]:
    found, service = document["rows"][row.name], document["rows"].get(SERVICE)
    seconds = volume_seconds(found)
    last = found["repeats"][-1]
    cells = [
        row.title + ("" if row.trained else " (untrained weights)"),
        told(Summary.of(seconds)),
        told(ratio(seconds, volume_seconds(service)), 1) if service else NOTHING,
        told(Summary.of(seconds).times(1000 / last["slices"]), 1),
        _measured_on(last, "members" if kind_of(row) == TRANSFORMER else "noise levels"),
        _ct_cell(row, document.get("ct")),
        f"{_asked(last, 'denoise') / last['sample']:.1f}",
    ]
    # The service's networks are those of its method in torch, where they can be counted.
    costs = found["gigaflops"] or document.get("waterfall", {}).get("gigaflops")
    if costs:
        work = slice_gigaflops(found, costs)
        reached = work * last["slices"] / float(np.median(seconds))
        cells += [f"{work:.2f}", f"{reached:.0f}"]
        cells += [f"{reached / most:.0%}" for most in ceilings(document["ceiling"]).values()]
    else:
        cells += [NOTHING] * 4
    cells += [f"{found['peak_bytes'] / 1e6:.0f}", f"{found['cold_seconds']:.1f}"]
    return [*cells, *_accuracy(found["accuracy"])]


def _measured_on(repeat: dict[str, Any], looped: str) -> str:
    thinned = f", 1 of {repeat['every']} {looped}" if repeat["every"] > 1 else ""
    if repeat["sample"] == repeat["slices"]:
        return f"all {repeat['slices']} slices{thinned}"
    return f"{repeat['sample']} of {repeat['slices']} slices{thinned}, scaled"


def _ct_cell(row: Row, ct: dict[str, Any] | None) -> str:
    if ct is None:
        return NOTHING
    if row.name == SERVICE:
        return f"{told(Summary.of(warm_seconds(ct)), 1)}, upload to mask"
    if row.name not in ct["rows"]:
        return NOTHING
    found = ct["rows"][row.name]
    kind = "volume in memory" if row.sample is None else "slices alone, scaled"
    return f"{volume_seconds(found)[-1]:.1f}, {kind}"


def _accuracy(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["not measured"] * 2
    if "reason" in found:
        return [found["reason"]] * 2
    return [f"{np.mean(found[key]):.3f}" for key in ("dice", "auprc")]


def phase_table(found: dict[str, Any], received: float | None) -> list[str]:
    """Seconds of one scan by phase, before and after, and how near its networks come to the ceiling.

    Parameters
    ----------
    found : dict
        The waterfall.
    received : float or None
        Seconds of an upload over HTTP.
    """
    after, before = found["after"]["phases"], found.get("before", {}).get("phases", {})
    most = ceilings(found["ceiling"])["float32"]
    whole = sum(p["seconds"] for p in after.values())
    lines = [] if received is None else [[f"{RECEIVE} (over HTTP)", NOTHING, f"{received:.2f}", *[NOTHING] * 4]]
    for name in (name for name in ORDER if name in after or name in before):
        now, then = after.get(name), before.get(name)
        cells = [name, f"{then['seconds']:.2f}" if then else NOTHING]
        if now is None:
            lines.append([*cells, *[NOTHING] * 5])
            continue
        work = sum(n * found["gigaflops"][network] for network, n in found["after"]["asked"].get(name, {}).items())
        cells += [f"{now['seconds']:.2f}", f"{now['seconds'] / whole:.0%}", f"{now['network']:.2f}"]
        reached = work / now["network"] if now["network"] else 0.0
        cells += [f"{reached:.0f}", f"{reached / most:.0%}"] if reached else [NOTHING] * 2
        lines.append(cells)
    past = sum(p["seconds"] for p in before.values())
    network = sum(p["network"] for p in after.values())
    sums = ["**all, from the file**", f"**{past:.2f}**" if before else NOTHING, f"**{whole:.2f}**", ""]
    lines.append([*sums, f"**{network:.2f}**; everything else {other_seconds(after):.2f}", "", ""])
    heads = ("phase", "before, s", "after, s", "share", "of these, networks, s", "GFLOP/s", "of float32 ceiling")
    return table(heads, lines)


def profile_table(found: dict[str, Any], most: dict[str, float]) -> list[str]:
    """Kinds of operator of each network, and what bounds each.

    Parameters
    ----------
    found : dict
        The profile.
    most : dict of str to float
        The ceilings of float32 and of int8, GFLOP/s.
    """
    lines = []
    for network, operators in found["networks"].items():
        whole = sum(o["seconds"] for o in operators)
        large = [o for o in operators if o["seconds"] >= LEAST_SHARE * whole]
        for o in large:
            flops, moved = o["gigaflop"] / o["seconds"], o["gigabytes"] / o["seconds"]
            ceiling = most["int8" if o["operator"] == IN_INT8 else "float32"]
            shares = {"arithmetic": flops / ceiling, "memory": moved / found["memory"]}
            told_ = [f"{flops:.0f}, {shares['arithmetic']:.0%}" if flops else NOTHING, f"{moved:.1f}"]
            lines.append([network, o["operator"], f"{o['seconds'] / whole:.0%}", *told_, _bound(shares)])
        rest = whole - sum(o["seconds"] for o in large)
        lines.append([network, "all others", f"{rest / whole:.0%}", *[NOTHING] * 3])
    return table(("network", "operator", "share of its time", "GFLOP/s, of ceiling", "GB/s", "bound by"), lines)


def _bound(shares: dict[str, float]) -> str:
    name = max(shares, key=lambda key: shares[key])
    return name if shares[name] >= BOUND else "neither: its own code, and waiting"


def gains_table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Each with its predicted and its measured effect."""
    heads = ("what", "predicted, times", "because", "measured, times", "without, s", "with it, s")
    lines = [
        [
            g["name"],
            f"{g['predicted']:.1f}",
            g["reason"],
            told(ratio(g["without"], g["with_it"])),
            *(f"{np.median(g[key]):.2f}" for key in ("without", "with_it")),
        ]
        for g in found
    ]
    return table(heads, lines)


def overlap(scaling: dict[str, Any], waterfall: dict[str, Any]) -> dict[str, Any] | None:
    """Two scans at once against one after the other, as a gain: the next is prepared while one is inferred."""
    alone, both = (
        next((p["seconds"] for p in scaling["together"] if (p["workers"], p["scans"]) == (1, n)), None) for n in (1, 2)
    )
    if not alone or not both:
        return None
    phases = waterfall["after"]["phases"]
    other = other_seconds(phases)
    whole = sum(p["seconds"] for p in phases.values())
    return {
        "name": "two scans sent at once to one worker, not one after the other",
        "reason": f"2 x {whole:.1f} s / (2 x {whole:.1f} s - the {other:.1f} s of one of them that are no networks)",
        "predicted": 2 * whole / (2 * whole - other),
        "without": [2 * seconds for seconds in alone],
        "with_it": both,
    }


def served_table(document: dict[str, Any]) -> list[str]:
    """Uploads to masks over HTTP."""
    lines = []
    for key, name in (("volume", "the T1 volume"), ("ct", "CT, 512 x 512 x 200")):
        if (found := document.get(key)) is None:
            continue
        warm = told(Summary.of(warm_seconds(found)))
        upload = told(Summary.of([run["upload"] for run in found["runs"]]))
        cells = [f"{found['megabytes']:.0f}", f"{found['runs'][0]['seconds']:.2f}", warm, upload]
        lines.append([name, found["runs"][0]["id"], *cells, f"{found['peak_bytes'] / 1e6:.0f}"])
    heads = ("scan", "bundle", "MB sent", "first, s", "later ones, s", "of these, upload, s", "peak memory, MB")
    return table(heads, lines)


def scaling_tables(found: dict[str, Any]) -> list[str]:
    """Numbers of the figure, with memory."""
    lines = []
    for key, name in (("slices", "share of the slices"), ("resolution", "voxels of so many mm")):
        for point in found[key]:
            seconds = told(Summary.of([run["seconds"] for run in point["runs"]]))
            shape = " x ".join(str(n) for n in point["shape"])
            lines.append([name, f"{point['value']:g}", shape, seconds, f"{point['peak_bytes'] / 1e6:.0f}"])
    first = table(("varied", "value", "voxels", "upload to mask, s", "peak memory so far, MB"), lines)
    lines = [
        [
            str(p["workers"]),
            str(p["scans"]),
            told(Summary.of(p["seconds"])),
            f"{np.median(p['seconds']) / p['scans']:.2f}",
            f"{p['peak_bytes'] / 1e6:.0f}",
        ]
        for p in found["together"]
    ]
    heads = ("workers", "scans at once", "until the last mask, s", "a scan, s", "peak memory so far, MB")
    return [*first, "", *table(heads, lines)]
