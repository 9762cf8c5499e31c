"""Tables of an evaluation, and their place in the README; no number is typed by hand."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app.manifest import Manifest

EARLIER = "Measured with an earlier version of this bundle."
MARKERS = ("<!-- evaluation:begin -->", "<!-- evaluation:end -->")
BOOTSTRAP = 2000


def interval(values: Sequence[float], statistic: Callable[[Any], Any] = np.median) -> str:
    """A statistic over subjects or cases, and its bootstrap 95 % interval."""
    rng = np.random.default_rng(0)
    data = np.asarray(values)
    low, high = np.percentile([statistic(rng.choice(data, len(data))) for _ in range(BOOTSTRAP)], (2.5, 97.5))
    return f"{statistic(data):.2f} ({low:.2f} to {high:.2f})"


def healthy_table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a healthy test scan, and the median."""
    lines = [
        "| healthy test scan | outcome | false positives, ml | slices | reversed | network evaluations | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        if r["outcome"] == "analysed":
            lines.append(
                f"| {r['subject']} | analysed | {r['false_positive_ml']:.2f} | {r['slices']} | {r['slices_reversed']} "
                f"| {r['network_evaluations']} | {r['seconds']:.1f} |"
            )
        else:
            lines.append(f"| {r['subject']} | {r['outcome']} | | | | | |")
    done = [r for r in rows if r["outcome"] == "analysed"]
    lines.append(
        f"| **median** | {len(done)} of {len(rows)} analysed | **{interval([r['false_positive_ml'] for r in done])}** "
        f"| {np.median([r['slices'] for r in done]):.0f} | {np.median([r['slices_reversed'] for r in done]):.0f} "
        f"| {np.median([r['network_evaluations'] for r in done]):.0f} | {np.median([r['seconds'] for r in done]):.1f} |"
    )
    return lines


def lesion_table(rows: list[dict[str, Any]]) -> list[str]:
    """Median Dice by shape and contrast over five scans, and over all shapes."""
    contrasts = sorted({r["contrast"] for r in rows}, key=lambda c: (-abs(c), -c))
    lines = [
        "| lesion shape | truth, ml | " + " | ".join(f"c = {c:+.2f}" for c in contrasts) + " |",
        "| --- | --- | " + " | ".join("---" for _ in contrasts) + " |",
    ]
    for shape in sorted({r["shape"] for r in rows}):
        mine = [r for r in rows if r["shape"] == shape]
        cells = [f"{np.median([r['dice'] for r in mine if r['contrast'] == c]):.2f}" for c in contrasts]
        lines.append(f"| {shape} | {np.median([r['truth_ml'] for r in mine]):.1f} | " + " | ".join(cells) + " |")
    for label, key in (("all, shipped threshold", "dice"), ("all, best threshold for each scan", "best_dice")):
        cells = [interval([r[key] for r in rows if r["contrast"] == c]) for c in contrasts]
        lines.append(f"| **{label}** | | " + " | ".join(cells) + " |")
    grade3 = [r["dice"] for r in rows if abs(r["contrast"]) == max(map(abs, contrasts))]
    lines += ["", f"Median Dice over both signs of c = 0.35 at the shipped threshold: **{interval(grade3)}**."]
    return lines


def heads_table(rows: list[dict[str, Any]]) -> list[str]:
    """How many heads of other scanners were analysed, and how much was found in them."""
    lines = [
        "| T1 with skull | analysed | found, ml: median (least to greatest) | others |",
        "| --- | --- | --- | --- |",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        found = [row["found_ml"] for row in mine if row["outcome"] == "analysed"]
        volumes = f"{np.median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else ""
        others = Counter(row["outcome"] for row in mine if row["outcome"] != "analysed")
        answers = ", ".join(f"{code} {count}" for code, count in sorted(others.items()))
        lines.append(f"| {kind} | {len(found)} of {len(mine)} | {volumes} | {answers} |")
    return lines


def foreign_table(rows: list[dict[str, Any]]) -> list[str]:
    """How many scans of each kind were refused, and why."""
    lines = ["| scans | refused | answers |", "| --- | --- | --- |"]
    merged: dict[str, dict[str, int]] = defaultdict(dict)
    for row in rows:
        merged[row["kind"]] = row["outcomes"]
    for kind, outcomes in merged.items():
        total = sum(outcomes.values())
        refused = total - outcomes.get("analysed", 0)
        answers = ", ".join(f"{code} {count}" for code, count in sorted(outcomes.items()))
        lines.append(f"| {kind} | {refused} of {total} | {answers} |")
    return lines


def tumour_table(rows: list[dict[str, Any]]) -> list[str]:
    """Both methods over all test patients, then each patient."""
    names = {
        "shipped_pooled": "Dice at the shipped threshold",
        "best_pooled": "best-achievable Dice, one threshold for all",
        "best_pooled_tumour_slices": "the same, slices with a tumour alone",
        "best_per_slice": "best-achievable Dice, a threshold for each slice with a tumour",
        "auprc": "AUPRC",
    }
    methods = {r["method"]: r for r in rows if "method" in r}
    lines = ["| over all test patients | this bundle | FLAIR's intensity |", "| --- | --- | --- |"]
    for key, name in names.items():
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(*m[key]) if key in m else "" for m in methods.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "| patient | outcome | slices | analysed | tumour not analysed | Dice, shipped | best Dice | intensity, best |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['subject']} | {r['outcome']} | {r['slices']} | {r['slices_analysed']} | {r['tumour_not_analysed']:.0%} "
        f"| {r['dice']:.2f} | {r['best_dice']:.2f} | {r['intensity_best_dice']:.2f} |"
        for r in rows
        if "subject" in r
    ]
    return lines


def render(document: dict[str, Any], manifest: Manifest, path: Path, readme: Path | None, sha256: str) -> None:
    """Write the evaluation's page, and its tables into the README, where one is given.

    A part that was not measured with this very bundle, of this hash, says so.
    """
    parts = (
        ("healthy", "Healthy test subjects", healthy_table),
        (
            "lesions",
            "Lesion shapes in healthy test subjects: median Dice over five seeds at the shipped threshold",
            lesion_table,
        ),
        ("heads", "Heads from other scanners, the brain taken out", heads_table),
        ("foreign", "Scans of another kind", foreign_table),
        ("single", "Single pictures of healthy test subjects", foreign_table),
        (
            "tumours",
            "Outlined tumours of test patients, all their slices; what was not analysed counts as not found",
            tumour_table,
        ),
    )
    lines: list[str] = []
    for key, title, table in parts:
        if key in document:
            lines += [f"### {title}", ""]
            lines += [] if document[key]["bundle_sha256"] == sha256 else [EARLIER, ""]
            lines += [*table(document[key]["rows"]), ""]
    body = "\n".join(lines)
    head = f"# Evaluation of {manifest.id}\n\nWritten by `python -m training.evaluate`; brackets are bootstrap 95 % "
    path.write_text(f"{head}intervals.\n\n{body}")
    if readme is not None and readme.exists():
        begin, end = MARKERS
        pattern = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
        text = readme.read_text()
        readme.write_text(pattern.sub(lambda _: f"{begin}\n{body}\n{end}", text))
