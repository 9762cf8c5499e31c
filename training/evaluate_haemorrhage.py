"""Detection of real haemorrhage in head CT by patient, by slice and by outline (ct-ich, Hssayeni 2020).

Test patients with haemorrhage chose nothing, and no patient with haemorrhage was in the training. Children are reported
apart, because the model was trained on adults.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from app.pipeline.findings import dice
from app.runtime.bundle import Bundle
from app.volume import BoolArray
from training.bundle_runs import analyse
from training.cluster_bootstrap import cluster_weights
from training.config import Config
from training.data import Split
from training.experiments.metrics import auroc, exact_counts
from training.image_archive import archive_path, load_stack, read_table, stack_names

ADULT_YEARS = 16.0
# Percentile of the anomaly map in a slice: a bleed of about a square centimetre reaches it.
SLICE_PERCENTILE = 99.0
KINDS = ("intraventricular", "intraparenchymal", "subarachnoid", "epidural", "subdural")

Row = dict[str, Any]


def area_under_curve(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Return the area under the ROC curve. Ties count half."""
    return auroc(*exact_counts(np.asarray(scores, dtype=np.float32), np.asarray(positive, dtype=np.bool_)))


def patient_interval(rows: Sequence[Row], statistic: Callable[[Sequence[Row]], float]) -> list[float]:
    """Return [value, low, high] of a statistic, with a bootstrap 95 % interval over patients.

    Patients with and without haemorrhage are drawn separately, so that both occur in each resample.
    """
    counts = cluster_weights([r["subject"] for r in rows], [str(r["haemorrhage"]) for r in rows], seed=0)
    drawn = [statistic([r for r, n in zip(rows, count, strict=True) for _ in range(n)]) for count in counts]
    return [statistic(rows), *np.percentile(drawn, (2.5, 97.5)).tolist()]


def evaluate_haemorrhage(config: Config, bundle: Bundle, split: Split) -> list[Row]:
    """Measure every patient with haemorrhage, healthy test adults, and healthy children.

    Returns
    -------
    list of dict
        One row per patient, and a last one with the statistics of the adults.
    """
    root = archive_path(config).parent
    by_file = {row["file"]: row for row in read_table(root / "slices.tsv")}
    seen = {int(subject) for subject in (*split.train, *split.validation)}
    rows = []
    for patient in tqdm(read_table(root / "patients.tsv"), desc="haemorrhage", unit="scan"):
        number = int(patient["patient"])
        if number in seen or patient["use"] == "fracture":
            continue
        subject = f"{number:03d}"
        row: Row = {
            "subject": subject,
            "adult": float(patient["age"]) >= ADULT_YEARS,
            "haemorrhage": patient["use"] == "haemorrhage",
        }
        labels = [by_file[name] for name in stack_names(config, subject)]
        rows.append(row | _measure(config, bundle, subject, labels))
    return [*rows, {"summary": summarise(rows)}]


def _measure(config: Config, bundle: Bundle, subject: str, labels: list[dict[str, str]]) -> Row:
    """Return outcome, found volume and slice scores of one patient."""
    volume = load_stack(config, subject).volume
    outcome, result = analyse(volume, bundle)
    if result is None:
        return {"outcome": outcome}
    analysed = np.isfinite(result.anomaly)
    # Fresh blood is brighter than brain. Wide sulci and old infarcts are darker.
    brighter = np.isin(result.labels, [lesion.label for lesion in result.lesions if lesion.difference > 0])
    slices: list[Row] = []
    for z in range(volume.shape[2]):
        bleeds = [kind for kind in KINDS if labels[z][kind] == "1"]
        inside = analysed[:, :, z]
        # A slice with haemorrhage that is not analysed is missed. Other such slices, as of the neck, would be easy.
        if bleeds or inside.any():
            score = float(np.percentile(result.anomaly[:, :, z][inside], SLICE_PERCENTILE)) if inside.any() else 0.0
            found_ml = float(result.mask[:, :, z].sum()) * volume.voxel_ml
            brighter_ml = float(brighter[:, :, z].sum()) * volume.voxel_ml
            slices.append({"bleeds": bleeds, "found_ml": found_ml, "brighter_ml": brighter_ml, "score": score})
    row: Row = {
        "outcome": outcome,
        "found_ml": float(result.mask.sum()) * volume.voxel_ml,
        "brighter_ml": float(brighter.sum()) * volume.voxel_ml,
        "findings": len(result.lesions),
        "score": max(s["score"] for s in slices),
        "slices": slices,
    }
    outlines = read_outlines(archive_path(config).parent / "masks", [label["file"] for label in labels])
    if outlines.any():
        outlined = outlines.any(axis=(0, 1))
        row |= {
            "outlined_ml": float(outlines.sum()) * volume.voxel_ml,
            "dice": dice(result.mask[:, :, outlined] > 0, outlines[:, :, outlined]),
            "brighter_dice": dice(brighter[:, :, outlined], outlines[:, :, outlined]),
        }
    return row


def read_outlines(folder: Path, files: Sequence[str]) -> BoolArray:
    """Return the outlined haemorrhage of a stack on the grid of its volume, (X, Y, Z). Empty without outlines."""
    images = []
    for file in files:
        path = folder / Path(file).with_suffix(".png").name
        images.append(np.asarray(Image.open(path)) > 0 if path.exists() else None)
    shape = next((image.shape for image in images if image is not None), (0, 0))
    stack = np.stack([np.zeros(shape, dtype=np.bool_) if image is None else image for image in images])
    return np.ascontiguousarray(stack.transpose(2, 1, 0))


def summarise(rows: Sequence[Row]) -> Row:
    """Return the statistics of the analysed adults, with intervals over patients."""
    adults = [r for r in rows if r["adult"] and r["outcome"] == "analysed"]

    def by_patient(key: str) -> Callable[[Sequence[Row]], float]:
        return lambda sample: area_under_curve([r[key] for r in sample], [r["haemorrhage"] for r in sample])

    def by_slice(key: str) -> Callable[[Sequence[Row]], float]:
        def statistic(sample: Sequence[Row]) -> float:
            # In a patient with haemorrhage, slices next to a bleed may show a part of it: only labelled ones count.
            slices = [s for r in sample for s in r["slices"]]
            return area_under_curve([s[key] for s in slices], [bool(s["bleeds"]) for s in slices])

        return statistic

    def false_ml(key: str) -> list[float]:
        unaffected = [r[key] for r in adults if not r["haemorrhage"]]
        return np.percentile(unaffected, (50, 90)).tolist() if unaffected else []

    def slices_found(key: str) -> dict[str, list[int]]:
        return {
            kind: [
                sum(1 for r in adults for s in r["slices"] if kind in s["bleeds"] and s[key] > 0),
                sum(1 for r in adults for s in r["slices"] if kind in s["bleeds"]),
            ]
            for kind in KINDS
        }

    return {
        "patients": len(adults),
        "with_haemorrhage": sum(r["haemorrhage"] for r in adults),
        "patient_auroc_volume": patient_interval(adults, by_patient("found_ml")),
        "patient_auroc_score": patient_interval(adults, by_patient("score")),
        "slice_auroc_volume": patient_interval(adults, by_slice("found_ml")),
        "slice_auroc_score": patient_interval(adults, by_slice("score")),
        "patient_auroc_brighter": patient_interval(adults, by_patient("brighter_ml")),
        "slice_auroc_brighter": patient_interval(adults, by_slice("brighter_ml")),
        "false_positive_ml": false_ml("found_ml"),
        "false_positive_brighter_ml": false_ml("brighter_ml"),
        "slices_found_by_kind": slices_found("found_ml"),
        "slices_found_brighter_by_kind": slices_found("brighter_ml"),
    }
