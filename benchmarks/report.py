"""Writer of docs/BENCHMARKS.md: fills page.md with tables of docs/BENCHMARKS.json."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import ONNX_ROWS, ROWS, SERVICE, TRANSFORMER, Row
from benchmarks.summary import ratio, seconds_outside_networks, summarise, volume_seconds, warm_seconds
from benchmarks.targets import compare_targets
from benchmarks.trace import PHASES
from training.experiments.markdown import bold, bullets, fill_template, table

TEMPLATE = Path(__file__).with_name("page.md")
NOT_MEASURED = "Not measured in this run."
EMPTY = "-"


def render(document: dict[str, Any], figure: str) -> str:
    """Return the page. `figure` is the path of the waterfall."""
    targets = compare_targets(document)
    values = {
        "provenance": _provenance(document),
        "met": f"{sum(target.met is True for target in targets)} of {len(targets)}",
        "targets": table(("target", "measured", ""), [(t.text, t.found or EMPTY, t.verdict) for t in targets]),
        "rows": _rows(document),
        "uploads": _uploads(document),
        "phases": _phases(document, figure),
    }
    return fill_template(TEMPLATE.read_text(), values)


def _provenance(document: dict[str, Any]) -> str:
    """List the machine and the time of each part, and the parts that failed or are missing."""
    lines = [f"Version {document['version']}, `{document['bundle']}` on `{document['scan']}`, {document['machine']}."]
    for name, part in document["parts"].items():
        if "measured" in part:
            lines.append(f"{name}: {part['measured']}, {part['repeats']} repeats, {part['seconds'] / 60:.1f} minutes.")
        if "failed" in part:
            lines.append(f"{name}: the last run failed. {part['failed'].rstrip('.')}.")
    return bullets([*lines, *document["notes"]])


def _rows(document: dict[str, Any]) -> str:
    if "rows" not in document:
        return NOT_MEASURED
    header = (
        "method", "T1 volume, s", "times Counterpart", "slice, ms", "timed on", "CT series, s",
        "denoiser evaluations per slice", "peak memory, MB", "cold start, s", "best Dice", "AUPRC",
    )  # fmt: skip
    return table(header, [row_cells(row, document) for row in ROWS if row.name in document["rows"]])


def row_cells(row: Row, document: dict[str, Any]) -> list[str]:
    """Return the table line of a row."""
    found, service = document["rows"][row.name], document["rows"].get(SERVICE)
    seconds, last = volume_seconds(found), found["repeats"][-1]
    evaluations = last["counts"].get("denoise", 0) * last["stride"] / last["sample"]
    return [
        row.title + ("" if row.is_trained else " (untrained)"),
        summarise(seconds),
        summarise(ratio(seconds, volume_seconds(service)), 1) if service else EMPTY,
        summarise([1000 * s / last["slices"] for s in seconds], 1),
        _timed_on(row, last),
        _ct_cell(row, document.get("ct")),
        f"{evaluations:.1f}",
        f"{found['peak_bytes'] / 1e6:.0f}",
        f"{found['cold_seconds']:.1f}",
        *_accuracy_cells(row, found["accuracy"]),
    ]


def _timed_on(row: Row, repeat: dict[str, Any]) -> str:
    looped = "members" if row.family == TRANSFORMER else "noise levels"
    thinned = f", 1 of {repeat['stride']} {looped}" if repeat["stride"] > 1 else ""
    if repeat["sample"] == repeat["slices"]:
        return f"all {repeat['slices']} slices{thinned}"
    return f"{repeat['sample']} of {repeat['slices']} slices{thinned}"


def _ct_cell(row: Row, ct: dict[str, Any] | None) -> str:
    if ct is None:
        return EMPTY
    if row.name == SERVICE:
        return f"{summarise(warm_seconds(ct), 1)}, upload to mask"
    if row.name in ONNX_ROWS or row.name not in ct["rows"]:
        return EMPTY
    scope = "volume in memory" if row.sample is None else "slices, scaled"
    return f"{volume_seconds(ct['rows'][row.name])[-1]:.1f}, {scope}"


def _accuracy_cells(row: Row, found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["not measured" if row.is_trained else EMPTY] * 2
    return [f"{np.mean(found[key]):.3f}" for key in ("dice", "auprc")]


def _uploads(document: dict[str, Any]) -> str:
    lines = []
    for key, name in (("volume", "T1 volume"), ("ct", "CT series, 512 x 512 x 200")):
        if (found := document.get(key)) is None:
            continue
        first, uploads = found["runs"][0], [run["upload"] for run in found["runs"]]
        sizes = (f"{found['megabytes']:.0f}", f"{found['peak_bytes'] / 1e6:.0f}")
        times = (f"{first['seconds']:.2f}", summarise(warm_seconds(found)), summarise(uploads))
        lines.append((name, first["id"], sizes[0], *times, sizes[1]))
    header = ("scan", "bundle", "upload, MB", "first scan, s", "later scans, s", "upload alone, s", "peak memory, MB")
    return table(header, lines) if lines else NOT_MEASURED


def _phases(document: dict[str, Any], figure: str) -> str:
    if (found := document.get("waterfall")) is None:
        return NOT_MEASURED
    lines = table(("phase", "before, s", "after, s", "share", "in networks, s"), phase_lines(found))
    outside = seconds_outside_networks(found["after"]["phases"])
    return f"![Waterfall of one scan]({figure})\n\n{lines}\n\nOutside the networks, the service takes {outside:.2f} s."


def phase_lines(found: dict[str, Any]) -> list[list[str]]:
    """Return the table lines of the waterfall."""
    after, before = found["after"]["phases"], found.get("before", {}).get("phases", {})
    whole = sum(phase["seconds"] for phase in after.values())
    lines = []
    for name in (name for name in PHASES if name in after or name in before):
        line = [name, f"{before[name]['seconds']:.2f}" if name in before else EMPTY]
        if name in after:
            seconds, network = after[name]["seconds"], after[name]["network"]
            line += [f"{seconds:.2f}", f"{100 * seconds / whole:.0f} %", f"{network:.2f}"]
        else:
            line += [EMPTY] * 3
        lines.append(line)
    whole_before = sum(phase["seconds"] for phase in before.values())
    network = sum(phase["network"] for phase in after.values())
    sums = [f"{whole_before:.2f}" if before else EMPTY, f"{whole:.2f}", "100 %", f"{network:.2f}"]
    lines.append([bold(cell) for cell in ("all", *sums)])
    return lines
