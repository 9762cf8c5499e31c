"""Markdown page of an evaluation: one table per part, from the measured rows."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from app.manifest import Manifest

EARLIER = "Measured with an earlier version of this bundle."
BOOTSTRAP = 2000


def interval(values: Sequence[float], statistic: Callable[[Any], Any] = np.median) -> str:
    """Format a statistic over subjects or cases with its bootstrap 95 % interval."""
    rng = np.random.default_rng(0)
    data = np.asarray(values)
    low, high = np.percentile([statistic(rng.choice(data, len(data))) for _ in range(BOOTSTRAP)], (2.5, 97.5))
    return f"{statistic(data):.2f} ({low:.2f} to {high:.2f})"


def healthy_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return one row for each healthy test scan, and the median."""
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
    """Return the median Dice by shape and contrast over five scans, and over all shapes."""
    contrasts = sorted({r["contrast"] for r in rows}, key=lambda c: (-abs(c), -c))
    lines = [
        "| lesion shape | truth, ml | " + " | ".join(f"c = {c:+.2f}" for c in contrasts) + " |",
        "| --- | --- | " + " | ".join("---" for _ in contrasts) + " |",
    ]
    for shape in sorted({r["shape"] for r in rows}):
        of_shape = [r for r in rows if r["shape"] == shape]
        cells = [f"{np.median([r['dice'] for r in of_shape if r['contrast'] == c]):.2f}" for c in contrasts]
        lines.append(f"| {shape} | {np.median([r['truth_ml'] for r in of_shape]):.1f} | " + " | ".join(cells) + " |")
    for label, key in (("all, shipped threshold", "dice"), ("all, best threshold for each scan", "best_dice")):
        cells = [interval([r[key] for r in rows if r["contrast"] == c]) for c in contrasts]
        lines.append(f"| **{label}** | | " + " | ".join(cells) + " |")
    strongest = [r["dice"] for r in rows if abs(r["contrast"]) == max(map(abs, contrasts))]
    lines += ["", f"Median Dice over both signs of c = 0.35 at the shipped threshold: **{interval(strongest)}**."]
    return lines


def heads_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the number of analysed heads of other scanners, and the volume of findings in them."""
    lines = [
        "| T1 with skull | analysed | found, ml: median (least to greatest) | others |",
        "| --- | --- | --- | --- |",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        found = [row["found_ml"] for row in of_kind if row["outcome"] == "analysed"]
        volumes = f"{np.median(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else ""
        refusals = Counter(row["outcome"] for row in of_kind if row["outcome"] != "analysed")
        codes = ", ".join(f"{code} {count}" for code, count in sorted(refusals.items()))
        lines.append(f"| {kind} | {len(found)} of {len(of_kind)} | {volumes} | {codes} |")
    return lines


def foreign_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the number of refused scans of each kind, and the error codes."""
    lines = ["| scans | refused | outcomes |", "| --- | --- | --- |"]
    for kind, outcomes in {row["kind"]: row["outcomes"] for row in rows}.items():
        total = sum(outcomes.values())
        refused = total - outcomes.get("analysed", 0)
        codes = ", ".join(f"{code} {count}" for code, count in sorted(outcomes.items()))
        lines.append(f"| {kind} | {refused} of {total} | {codes} |")
    return lines


def tumour_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return both methods over all test patients, then each patient."""
    names = {
        "shipped_pooled": "Dice at the shipped threshold",
        "best_pooled": "best-achievable Dice, one threshold for all",
        "best_pooled_tumour_slices": "the same, only slices with a tumour",
        "best_per_slice": "best-achievable Dice, a threshold for each slice with a tumour",
        "auprc": "AUPRC",
    }
    methods = {r["method"]: r for r in rows if "method" in r}
    lines = ["| over all test patients | this bundle | intensity threshold |", "| --- | --- | --- |"]
    for key, name in names.items():
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(*m[key]) if key in m else "" for m in methods.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "| patient | outcome | slices | analysed | tumour not analysed | Dice, shipped | best Dice | best, intensity |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['subject']} | {r['outcome']} | {r['slices']} | {r['slices_analysed']} | {r['tumour_not_analysed']:.0%} "
        f"| {r['dice']:.2f} | {r['best_dice']:.2f} | {r['intensity_best_dice']:.2f} |"
        for r in rows
        if "subject" in r
    ]
    return lines


PARTS = (
    ("healthy", "Healthy test subjects", healthy_table),
    (
        "lesions",
        "Lesion shapes in healthy test subjects: median Dice over five seeds at the shipped threshold",
        lesion_table,
    ),
    ("heads", "Heads of other scanners after brain extraction", heads_table),
    ("foreign", "Scans outside the training distribution", foreign_table),
    ("single", "Single images of healthy test subjects", foreign_table),
    (
        "tumours",
        "Outlined tumours of test patients in all slices (a tumour that is not analysed counts as missed)",
        tumour_table,
    ),
)


def evaluation_page(document: dict[str, Any], manifest: Manifest, sha256: str) -> str:
    """Return the page of an evaluation.

    Parameters
    ----------
    document : dict
        Measured parts by name, each with its rows and the hash of the bundle it was measured with.
    manifest : Manifest
    sha256 : str
        Hash of the present bundle. Parts with another hash are marked.
    """
    lines = [
        f"# Evaluation of {manifest.id}",
        "",
        "Written by `python -m training.evaluate CONFIG`. Brackets are bootstrap 95 % intervals.",
        "",
    ]
    for key, title, table in PARTS:
        if key in document:
            lines += [f"### {title}", ""]
            lines += [] if document[key]["bundle_sha256"] == sha256 else [EARLIER, ""]
            lines += [*table(document[key]["rows"]), ""]
    return "\n".join(lines)
