"""docs/BENCHMARKS.md from the JSON beside it: no number is typed by hand."""

from typing import Any

import numpy as np

from benchmarks.rows import INT8, ROWS, SERVICE, Row
from benchmarks.statistics import Summary, ratio, scale_factor
from benchmarks.verdict import int8_verdict

NOTHING = "-"
CONDITIONS = """Brackets are least and largest; a ratio is taken repeat by repeat. The service and its method in torch
are timed from the volume in memory to the detection, resampling included; the others on prepared slices, without it,
to their advantage; they start with the encoder and end with the anomaly map on the slices. What was measured on a
sample is multiplied by slices / sample. The transformer has about as many parameters as the denoiser, and an
evaluation of it is one position; the pixel-space network is the denoiser on one channel of pixels. Accuracy: mean
over synthetic lesions of validation subjects, on up to four slices of each case with the lesion and four without, the
same for every row, at the threshold that suits each case best; slice by slice and batched are one algorithm, judged
once. Operations count two for a multiply and an add, of convolutions and matrix products.""".replace("\n", " ")
AFTER_PHASES = (
    "From the file to the results, the bundle loaded: of the repeats, the one that took the median time. "
    "Time belongs to the innermost phase."
)


def told(summary: Summary, digits: int = 2) -> str:
    """Median, and least to largest."""
    return f"{summary.median:.{digits}f} ({summary.low:.{digits}f} to {summary.high:.{digits}f})"


def volume_seconds(found: dict[str, Any]) -> list[float]:
    """Seconds of a whole volume, repeat by repeat, scaled from the sample where it was one."""
    return [r["seconds"] * scale_factor(r["slices"], r["sample"]) for r in found["repeats"]]


def slice_gigaflops(found: dict[str, Any], costs: dict[str, float]) -> float:
    """Thousand million operations of the networks, a slice."""
    last = found["repeats"][-1]
    return float(sum(count * costs[name] for name, count in last["counts"].items()) / last["sample"])


def main_table(document: dict[str, Any]) -> list[str]:
    """One line a method."""
    rows = [row for row in ROWS if row.name in document["rows"]]
    heads = (
        "method", "whole T1 volume, s", "times the service", "slice, ms", "measured on", "evaluations a slice",
        "GFLOP a slice", "GFLOP/s", "of float32 ceiling", "of int8 ceiling", "peak memory, MB", "cold start, s",
        "best Dice", "AUPRC",
    )  # fmt: skip
    return [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *(_line(row, document) for row in rows)]


def _line(row: Row, document: dict[str, Any]) -> str:
    found, service = document["rows"][row.name], document["rows"].get(SERVICE)
    seconds = volume_seconds(found)
    last = found["repeats"][-1]
    # The service's networks are those of its method in torch, where they can be counted.
    costs = found["gigaflops"] or document["gigaflops"]
    cells = [
        row.title + ("" if row.trained else " (untrained weights)"),
        told(Summary.of(seconds)),
        told(ratio(seconds, volume_seconds(service)), 1) if service else NOTHING,
        told(Summary.of(seconds).times(1000 / last["slices"]), 1),
        _measured_on(last),
        f"{last['counts'].get('denoise', 0) / last['sample']:.1f}",
    ]
    if costs:
        work = slice_gigaflops(found, costs)
        reached = work * last["slices"] / float(np.median(seconds))
        ceiling = {k: float(np.median([c[k] for c in document["ceiling"]])) for k in ("float32", "int8")}
        cells += [f"{work:.2f}", f"{reached:.0f}", f"{reached / ceiling['float32']:.0%}"]
        cells += [f"{reached / ceiling['int8']:.0%}" if row.name == INT8 else NOTHING]
    else:
        cells += [NOTHING] * 4
    cells += [f"{found['peak_bytes'] / 1e6:.0f}", f"{found['cold_seconds']:.1f}"]
    return f"| {' | '.join([*cells, *_accuracy(found['accuracy'])])} |"


def _measured_on(repeat: dict[str, Any]) -> str:
    if repeat["sample"] == repeat["slices"]:
        return f"all {repeat['slices']} slices"
    return f"{repeat['sample']} of {repeat['slices']} slices, scaled"


def _accuracy(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["not measured"] * 2
    if "reason" in found:
        return [found["reason"]] * 2
    return [f"{np.mean(found[key]):.3f}" for key in ("dice", "auprc")]


def phase_table(phases: dict[str, dict[str, float]]) -> list[str]:
    """Seconds of one scan by phase."""
    whole = sum(p["seconds"] for p in phases.values())
    lines = ["| phase | seconds | share | of these, networks |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {p['seconds']:.2f} | {p['seconds'] / whole:.0%} | {p['network']:.2f} |"
        for name, p in phases.items()
    ]
    network = sum(p["network"] for p in phases.values())
    return [*lines, f"| **all** | **{whole:.2f}** | | **{network:.2f}**; everything else {whole - network:.2f} |"]


def render(document: dict[str, Any], figure: str) -> str:
    """The whole page."""
    ceiling = {k: Summary.of([c[k] for c in document["ceiling"]]) for k in ("float32", "int8")}
    start = document["start"]
    lines = ["# Benchmarks", "", _conditions(document), "", *main_table(document), ""]
    bound = (
        f"Ceiling of this machine, in the same turns: float32 {told(ceiling['float32'], 0)} GFLOP/s, int8 "
        f"{told(ceiling['int8'], 0)} GOP/s (one matrix product through onnxruntime)."
    )
    begun = (
        f"`counterpart --help`: {told(Summary.of(start['help']))} s. First network evaluation of `counterpart detect`, "
        f"from the start of its process: on the golden pair {told(Summary.of(start['golden']))} s, on the scan "
        f"{told(Summary.of(start['scan']))} s."
    )
    lines += [bound, "", int8_verdict(document), ""]
    lines += ["No row is measured on a CT series: this command has none for that yet.", ""]
    lines += ["## Where the seconds of one scan go", "", f"![Waterfall of one scan]({figure})", ""]
    lines += [*phase_table(document["phases"]), "", AFTER_PHASES, "", "## Start", "", begun]
    return "\n".join(lines) + "\n"


def _conditions(document: dict[str, Any]) -> str:
    """How all of it was measured."""
    return (
        f"Written by `python -m benchmarks` on {document['machine']}: {document['repeats']} repeats of each row, in "
        f"turns, one process a row, `{document['bundle']}` on `{document['scan']}`. {CONDITIONS}"
    )
