"""Tables of the evaluation on real haemorrhage: statistics of the adults, then each patient."""

from typing import Any

from training.cluster_bootstrap import Interval
from training.experiments.markdown import table
from training.formats import show_interval

NAMES = {
    "patient_auroc_volume": "AUROC by patient, volume of the findings",
    "patient_auroc_score": "AUROC by patient, largest slice score",
    "slice_auroc_volume": "AUROC by slice, volume of the findings in it",
    "slice_auroc_score": "AUROC by slice, 99th percentile of its anomaly map",
}


def haemorrhage_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the statistics of the adults, the found slices by kind of haemorrhage, and one row for each patient."""
    summary = next(row["summary"] for row in rows if "summary" in row)
    scope = f"{summary['patients']} adults, {summary['with_haemorrhage']} of them with haemorrhage."
    statistics = [[name, show_interval(Interval(*summary[key]))] for key, name in NAMES.items()]
    false_ml = ", ".join(f"{v:.2f}" for v in summary["false_positive_ml"])
    statistics.append(["found in adults without haemorrhage, ml: median, 90th percentile", false_ml])
    kinds = [[kind, f"{hit} of {count}"] for kind, (hit, count) in summary["slices_found_by_kind"].items()]
    patient = [
        "patient",
        "adult",
        "haemorrhage",
        "outcome",
        "found, ml",
        "bleeding slices found",
        "outlined, ml",
        "Dice",
    ]
    tables = (
        table(["adults", "value (95 % interval)"], statistics),
        table(["kind of haemorrhage", "slices of adults with at least one finding"], kinds),
        table(patient, [_patient_row(row) for row in rows if "subject" in row]),
    )
    intervals = "Intervals resample patients, with and without haemorrhage separately."
    return "\n\n".join([f"{scope} {intervals}", *tables]).splitlines()


def _patient_row(row: dict[str, Any]) -> list[str]:
    bleeding = [s for s in row.get("slices", ()) if s["bleeds"]]
    hits = f"{sum(s['found_ml'] > 0 for s in bleeding)} of {len(bleeding)}" if bleeding else ""
    answers = ["yes" if row[key] else "no" for key in ("adult", "haemorrhage")]
    found, outlined, overlap = (f"{row[key]:.2f}" if key in row else "" for key in ("found_ml", "outlined_ml", "dice"))
    return [row["subject"], *answers, row["outcome"], found, hits, outlined, overlap]
