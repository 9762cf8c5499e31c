"""Markdown page of an evaluation: one table per part, from the measured rows."""

from collections.abc import Callable
from typing import Any

import numpy as np

from app.manifest import Manifest
from training.cluster_bootstrap import cluster_weights, crossed_weights, interval, mean, quantile
from training.formats import show_interval
from training.haemorrhage_page import haemorrhage_table
from training.site_profile_page import site_profile_table
from training.unseen_page import heads_table, pathology_table, unseen_lesion_table

EARLIER = "Measured with an earlier version of this bundle."


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
    weights = cluster_weights([r["subject"] for r in done], seed=0)
    found = show_interval(interval(quantile([r["false_positive_ml"] for r in done]), weights))
    lines.append(
        f"| **median** | {len(done)} of {len(rows)} analysed | **{found}** "
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
        cells = [_median([r for r in rows if r["contrast"] == c], key) for c in contrasts]
        lines.append(f"| **{label}** | | " + " | ".join(cells) + " |")
    strongest = [r for r in rows if abs(r["contrast"]) == max(map(abs, contrasts))]
    lines += [
        "",
        f"Median Dice over both signs of c = 0.35 at the shipped threshold: **{_median(strongest, 'dice')}**.",
    ]
    lines.append(
        "Intervals resample the subjects and the shapes (pigeonhole bootstrap, Owen 2007, doi 10.1214/07-AOAS122)."
    )
    if found := [(float(hit), r) for r in rows for _, hit in r.get("lesions", ())]:
        weights = crossed_weights([r["subject"] for _, r in found], [r["shape"] for _, r in found])
        share = show_interval(interval(mean([hit for hit, _ in found]), weights))
        lines.append(f"Share of the {len(found)} connected lesions with at least one marked voxel: **{share}**.")
    return lines


def _median(rows: list[dict[str, Any]], key: str) -> str:
    """Format the median of a score with its interval over subjects and shapes."""
    weights = crossed_weights([r["subject"] for r in rows], [r["shape"] for r in rows])
    return show_interval(interval(quantile([r[key] for r in rows]), weights))


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


Table = Callable[..., list[str]]
# Part, title, table of its rows, and other parts whose rows the table takes if one bundle has measured both.
PARTS: tuple[tuple[str, str, Table, tuple[str, ...]], ...] = (
    ("healthy", "Healthy test subjects", healthy_table, ()),
    (
        "lesions",
        "Lesion shapes in healthy test subjects: median Dice over five seeds at the shipped threshold",
        lesion_table,
        (),
    ),
    ("heads", "Healthy heads of other scanners", heads_table, ()),
    ("heads", "Healthy heads of other scanners, with a site profile", site_profile_table, ()),
    ("unseen_lesions", "Lesions on scanners that are not in training", unseen_lesion_table, ("lesions",)),
    ("pathology", "Real lesions, and large lesions in healthy test subjects", pathology_table, ()),
    ("foreign", "Scans outside the training distribution", foreign_table, ()),
    ("single", "Single images of healthy test subjects", foreign_table, ()),
    (
        "tumours",
        "Outlined tumours of test patients in all slices (a tumour that is not analysed counts as missed)",
        tumour_table,
        (),
    ),
    ("haemorrhage", "Real haemorrhage: test patients of ct-ich", haemorrhage_table, ()),
)


def evaluation_page(document: dict[str, Any], manifest: Manifest, sha256: str, scope: str = "") -> str:
    """Return the page of an evaluation.

    Parameters
    ----------
    document : dict
        Measured parts by name, each with its rows and the hash of the bundle it was measured with. A `note` of a part
        states how that bundle differs from the present one.
    manifest : Manifest
    sha256 : str
        Hash of the present bundle. Parts with another hash are marked.
    scope : str
        Scanners of the test scans, and what was known about the scans before.
    """
    lines = [
        f"# Evaluation of {manifest.id}",
        "",
        "Written by `python -m training.evaluate CONFIG`. Brackets are bootstrap 95 % intervals.",
        "",
    ]
    lines += [scope.strip(), ""] if scope else []
    for key, title, table, others in PARTS:
        if key in document:
            own = document[key]["bundle_sha256"]
            same = [
                document[o]["rows"] if o in document and document[o]["bundle_sha256"] == own else [] for o in others
            ]
            if content := table(document[key]["rows"], *same):
                lines += [
                    f"### {title}",
                    "",
                    *([] if own == sha256 else [document[key].get("note", EARLIER), ""]),
                    *content,
                    "",
                ]
    return "\n".join(lines)
