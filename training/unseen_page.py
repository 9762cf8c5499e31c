"""Tables of an evaluation on scanners that no training saw, and on real and large lesions."""

from collections import Counter
from functools import partial
from typing import Any

import numpy as np

from training.cluster_bootstrap import MIN_CLUSTERS, cluster_weights, interval, mean, quantile
from training.experiments.markdown import table
from training.formats import show_interval, show_share
from training.lesion_comparison import Cases, Compared, both_groups, families
from training.lesion_scores import SIZE_CLASSES_ML, size_class, size_class_name

Rows = list[dict[str, Any]]
NOT_MEASURED = "not measured with this bundle"
HEADS_NOTE = """\
The first row counts each person once. It leaves out second files of a person, and a mean of many people. Volumes are
measured on the grid of each file, as the service returns them: the DICOM series have the voxels of their scanner, the
other files those of the data set. Intervals of volumes resample people. Those of the share of analysed scans are exact
binomial intervals (Clopper and Pearson 1934)."""
LESIONS_NOTE = """\
The shapes and contrasts are the same at home and on the other scanners. A foreign patch is tissue of another place of
the same brain, under the outline of a stroke. Training uses no such patch. A refused scan has a Dice of 0. A connected
lesion is found if at least one of its voxels is marked, and a finding is false if it touches no lesion (Carass et al.
2017, doi 10.1016/j.neuroimage.2016.12.064). Lesions below 0.05 ml are not counted. Intervals resample the subjects and
the shapes (pigeonhole bootstrap, Owen 2007, doi 10.1214/07-AOAS122). Five shapes are few, so that the true uncertainty
may be larger."""


# ---- healthy heads -----------------------------------------------------------------------------


def heads_table(rows: Rows) -> list[str]:
    """Return acceptance and false findings by scanner, and each scan of a scanner that is not in training."""
    unseen = [row for row in rows if not row["in_training"]]
    known = [row for row in rows if row["in_training"]]
    people = [row for row in unseen if row["counted"]]
    lines = [*HEADS_NOTE.splitlines(), ""]
    summary = [_heads_row(f"**scanners not in training: {len(people)} people**", people)]
    for note, group in (("", unseen), (" (scanner in training, people not)", known)):
        for kind in dict.fromkeys(row["kind"] for row in group):
            of_kind = [row for row in group if row["kind"] == kind]
            left_out = "" if any(row["counted"] for row in of_kind) else " (not in the first row)"
            summary.append(_heads_row(kind + note + left_out, of_kind))
    header = ["healthy T1", "analysed", "false findings, ml: median", "90th percentile", "findings in a scan", "others"]
    lines += [*table(header, summary).splitlines(), "", "Each scan of a scanner that is not in training:", ""]
    header = ["scan", "scanner", "voxel, mm", "known before from", "outcome", "found, ml", "largest, ml", "findings"]
    return [*lines, *table(header, [_scan_row(row) for row in unseen]).splitlines()]


def _heads_row(title: str, rows: Rows) -> list[str]:
    done = [row for row in rows if row["outcome"] == "analysed"]
    refusals = Counter(row["outcome"] for row in rows if row["outcome"] != "analysed")
    codes = ", ".join(f"{code} {count}" for code, count in sorted(refusals.items()))
    share = show_share(len(done), len(rows))
    if not done:
        return [title, share, "", "", "", codes]
    ml = [row["found_ml"] for row in done]
    cells = [f"{np.median(ml):.2f}", ""]
    if len(done) >= MIN_CLUSTERS:
        weights = cluster_weights([row["person"] for row in done], seed=0)
        cells = [show_interval(interval(quantile(ml, percent), weights)) for percent in (50, 90)]
    return [title, share, *cells, f"{np.mean([row['findings'] for row in done]):.1f}", codes]


def _scan_row(row: dict[str, Any]) -> list[str]:
    cells = [row["name"], row["kind"], " x ".join(f"{mm:g}" for mm in row["voxel_mm"]), row["known_from"]]
    if row["outcome"] != "analysed":
        return [*cells, row["outcome"], "", "", ""]
    return [*cells, "analysed", f"{row['found_ml']:.2f}", f"{row['largest_ml']:.2f}", str(row["findings"])]


# ---- lesions in these heads --------------------------------------------------------------------


def _cells(found: Compared) -> list[str]:
    """Return a statistic of both groups with the number of measurements, and its ratio."""
    both = ((found.unseen, found.unseen_count), (found.home, found.home_count))
    cells = [f"{show_interval(value)}, n = {count}" if value else NOT_MEASURED for value, count in both]
    return [*cells, show_interval(found.ratio)]


def _has_size(ml: float, *, index: int) -> bool:
    """Return whether a lesion belongs to a size class."""
    return size_class(ml) == index


def unseen_lesion_table(rows: Rows, home: Rows) -> list[str]:
    """Return Dice, found lesions and false findings on scanners that are not in training and at home, and ratios.

    Parameters
    ----------
    rows : list of dict
        Rows of the part `unseen_lesions`.
    home : list of dict
        Rows of the part `lesions`, measured with the same bundle. Empty if there are none.
    """
    every = families(both_groups(rows, home))
    lines = [*LESIONS_NOTE.splitlines(), ""]
    first = ["median Dice at the shipped threshold", "scanners not in training", "home", "ratio"]
    dice = [[title, *_cells(Cases.of(chosen, "dice").compare(quantile))] for title, chosen in every]
    lines += table(first, dice).splitlines()
    share = [[f"{title}, all sizes", *_cells(Cases.of_lesions(chosen).compare(mean))] for title, chosen in every]
    for title, chosen in every[-2:]:
        for index in range(len(SIZE_CLASSES_ML)):
            cases = Cases.of_lesions(chosen, partial(_has_size, index=index))
            if cases.values:
                share.append([f"{title}, {size_class_name(index)}", *_cells(cases.compare(mean))])
    lines += ["", *table(["share of the connected lesions that is found", *first[1:]], share).splitlines(), ""]
    false = [
        [f"{name}, {title}", *_cells(Cases.of(chosen, key).compare(mean))]
        for title, chosen in every
        for name, key in (("false findings in a scan", "false_findings"), ("their volume, ml", "false_ml"))
    ]
    return [*lines, *table(["mean in scans with a lesion", *first[1:]], false).splitlines()]


# ---- real and large lesions --------------------------------------------------------------------


def pathology_table(rows: Rows) -> list[str]:
    """Return the outcome of each scan with real or large lesions, and the overlap with each outline."""
    header = ["scan", "lesions", "outline, ml", "outcome", "found, ml", "Dice, shipped", "best Dice", "lesions found"]
    lines = []
    for row in rows:
        hits = [hit for _, hit in row["lesions"]]
        scores = [f"{row['found_ml']:.1f}"] if "found_ml" in row else [""]
        scores += [f"{row['dice']:.2f}", f"{row['best_dice']:.2f}", f"{sum(hits)} of {len(hits)}"]
        lines.append(
            [row["name"], f"{row['kind']}: {row['outline']}", f"{row['truth_ml']:.1f}", row["outcome"], *scores]
        )
    scans = {(row["kind"], row["name"]): row["outcome"] for row in rows}
    analysed = sum(code == "analysed" for code in scans.values())
    return [*table(header, lines).splitlines(), "", f"{analysed} of {len(scans)} scans were analysed."]
