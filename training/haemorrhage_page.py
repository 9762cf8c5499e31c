"""Tables of the evaluation on real haemorrhage: statistics of the adults, then each patient."""

from typing import Any

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
    false_ml = ", ".join(f"{v:.2f}" for v in summary["false_positive_ml"])
    lines = [
        f"{scope} Intervals resample patients, with and without haemorrhage separately.",
        "",
        "| adults | value (95 % interval) |",
        "| --- | --- |",
        *(f"| {name} | {'{:.2f} ({:.2f} to {:.2f})'.format(*summary[key])} |" for key, name in NAMES.items()),
        f"| found in adults without haemorrhage, ml: median, 90th percentile | {false_ml} |",
        "",
        "| kind of haemorrhage | slices of adults with at least one finding |",
        "| --- | --- |",
        *(f"| {kind} | {hit} of {count} |" for kind, (hit, count) in summary["slices_found_by_kind"].items()),
        "",
        "| patient | adult | haemorrhage | outcome | found, ml | bleeding slices found | outlined, ml | Dice |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return lines + [_patient_row(row) for row in rows if "subject" in row]


def _patient_row(row: dict[str, Any]) -> str:
    bleeding = [s for s in row.get("slices", ()) if s["bleeds"]]
    hits = f"{sum(s['found_ml'] > 0 for s in bleeding)} of {len(bleeding)}" if bleeding else ""
    found = f"{row['found_ml']:.2f}" if "found_ml" in row else ""
    outlined, overlap = (f"{row[key]:.2f}" if key in row else "" for key in ("outlined_ml", "dice"))
    answers = " | ".join("yes" if row[key] else "no" for key in ("adult", "haemorrhage"))
    return f"| {row['subject']} | {answers} | {row['outcome']} | {found} | {hits} | {outlined} | {overlap} |"
