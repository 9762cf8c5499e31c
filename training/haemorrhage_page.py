"""Tables of the evaluation on real haemorrhage: statistics of the adults, then each patient."""

from typing import Any

from training.cluster_bootstrap import Interval
from training.experiments.markdown import table
from training.formats import show_interval

# Rows of the statistics: name, and its keys for all findings and for those that are brighter than the counterpart.
NAMES = (
    ("AUROC by patient, volume of the findings", "patient_auroc_volume", "patient_auroc_brighter"),
    ("AUROC by patient, largest slice score", "patient_auroc_score", None),
    ("AUROC by slice, volume of the findings in it", "slice_auroc_volume", "slice_auroc_brighter"),
    ("AUROC by slice, 99th percentile of its anomaly map", "slice_auroc_score", None),
)
BRIGHTER = "only findings that are brighter than the counterpart"


def haemorrhage_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the statistics of the adults, the found slices by kind of haemorrhage, and one row for each patient."""
    summary = next(row["summary"] for row in rows if "summary" in row)
    scope = f"{summary['patients']} adults, {summary['with_haemorrhage']} of them with haemorrhage."
    statistics = [
        [name, *(show_interval(Interval(*summary[key])) if key else "" for key in keys)] for name, *keys in NAMES
    ]
    false_ml = [
        ", ".join(f"{v:.2f}" for v in summary[key]) for key in ("false_positive_ml", "false_positive_brighter_ml")
    ]
    statistics.append(["found in adults without haemorrhage, ml: median, 90th percentile", *false_ml])
    found_by_kind = [summary[key] for key in ("slices_found_by_kind", "slices_found_brighter_by_kind")]
    kinds = [
        [kind, *(f"{hit} of {count}" for hit, count in (found[kind] for found in found_by_kind))]
        for kind in found_by_kind[0]
    ]
    patient = [
        "patient",
        "adult",
        "haemorrhage",
        "outcome",
        "found, ml",
        "bleeding slices found",
        "outlined, ml",
        "Dice",
        "brighter findings, ml",
        "their Dice",
    ]
    tables = (
        table(["adults", "all findings (95 % interval)", BRIGHTER], statistics),
        table(["kind of haemorrhage", "slices of adults with at least one finding", BRIGHTER], kinds),
        table(patient, [_patient_row(row) for row in rows if "subject" in row]),
    )
    intervals = (
        "Intervals resample patients, with and without haemorrhage separately. Fresh blood is brighter than brain. "
        "Wide sulci and old infarcts are darker."
    )
    return "\n\n".join([f"{scope} {intervals}", *tables]).splitlines()


def _patient_row(row: dict[str, Any]) -> list[str]:
    bleeding = [s for s in row.get("slices", ()) if s["bleeds"]]
    hits = f"{sum(s['found_ml'] > 0 for s in bleeding)} of {len(bleeding)}" if bleeding else ""
    answers = ["yes" if row[key] else "no" for key in ("adult", "haemorrhage")]
    found, *others = (
        f"{row[key]:.2f}" if key in row else ""
        for key in ("found_ml", "outlined_ml", "dice", "brighter_ml", "brighter_dice")
    )
    return [row["subject"], *answers, row["outcome"], found, hits, *others]
