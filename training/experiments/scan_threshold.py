"""Thresholds that a scan raises by its own anomaly map: false findings and Dice on validation subjects (decision 27).

On a scanner that the model does not know, small differences are spread over the whole brain. The highest values of the
scan outside its large findings show where these differences end. No shipped bundle uses such a rule.

`python -m training.experiments.scan_threshold CONFIG BUNDLE` measures several rules on validation scans of the
configuration: healthy, with a lesion shape of multiple sclerosis, and with a large stroke. It writes
docs/evaluation/BUNDLE-scan-threshold.csv and .md. No test subject is used.
"""

import argparse
import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from app.manifest import Manifest, Residual
from app.pipeline.findings import dice, label_findings
from app.pipeline.risk_control import scale_thresholds
from app.runtime.bundle import load_bundle
from app.volume import BoolArray, FloatArray, Volume
from training.config import ROOT, Config, data_root
from training.data import load_scan, load_split
from training.experiments.cases import make_case
from training.experiments.markdown import table
from training.experiments.segmentation import BATCH, AnomalyMap, counterpart_map, mask_map
from training.lesion_insertion import insert_lesion, load_lesion_shape
from training.unseen_scans import load_stroke_shape, load_unseen_list

NO_RULE = "thresholds of the bundle"
# No finding has this volume, so that none is left out.
LARGER_THAN_A_HEAD = 1e4
PERCENTILES = (99.8, 99.9, 99.95, 99.98)
FINDING_ML = (0.3, 0.5, 1.0, LARGER_THAN_A_HEAD)
CONTRASTS = (0.35, -0.35)
HEALTHY, SMALL, LARGE = "healthy", "multiple sclerosis", "stroke, dark"
# Every second subject gets a stroke.
STROKE_EVERY = 2
# Dilations of a large finding before it is left out: its rim is below the extent threshold, but part of the lesion.
RIM_PIXELS = 2
# The factor is rounded up to hundredths.
FACTOR_STEPS = 100

Row = dict[str, Any]


class Rule(NamedTuple):
    """Rule by which a scan raises its thresholds.

    Attributes
    ----------
    percentile : float
        The threshold is at least this percentile of the scan's own anomaly map.
    finding_ml : float
        Findings of at least this volume are left out of the percentile, because a lesion must not raise the thresholds.
    """

    percentile: float
    finding_ml: float


class MadeScan(NamedTuple):
    """Validation scan, healthy or with a lesion."""

    subject: str
    kind: str
    volume: Volume
    truth: BoolArray


def raise_thresholds(anomaly: FloatArray, settings: Residual, rule: Rule | None, voxel_ml: float) -> Residual:
    """Return the settings with both thresholds raised by one factor, if the anomaly map of the scan requires it.

    Parameters
    ----------
    anomaly : (N, H, W) ndarray
        Anomaly map on the slices of the model. NaN in pixels that were not analysed.
    settings : Residual
    rule : Rule, optional
        None changes nothing.
    voxel_ml : float
        Volume of a pixel of a slice.
    """
    if rule is None:
        return settings
    labels, _ = label_findings(anomaly, settings, voxel_ml)
    is_large = np.bincount(labels.ravel()) * voxel_ml >= rule.finding_ml
    is_large[0] = False
    rest = np.isfinite(anomaly) & ~ndimage.binary_dilation(is_large[labels], iterations=RIM_PIXELS)
    if not rest.any():
        return settings
    own = float(np.percentile(anomaly[rest], rule.percentile))
    factor = float(np.ceil(own / settings.threshold * FACTOR_STEPS)) / FACTOR_STEPS
    return scale_thresholds(settings, max(1.0, factor))


def rules() -> dict[str, Rule | None]:
    """Return the rules by name."""
    found: dict[str, Rule | None] = {NO_RULE: None}
    for percentile, finding_ml in itertools.product(PERCENTILES, FINDING_ML):
        left_out = f"findings of {finding_ml:g} ml left out" if finding_ml < LARGER_THAN_A_HEAD else "nothing left out"
        found[f"percentile {percentile:g}, {left_out}"] = Rule(percentile, finding_ml)
    return found


def stroke_shapes() -> list[str]:
    """Return the stroke shapes that no test uses, largest first."""
    unseen = load_unseen_list()
    used = {*unseen.patch_shapes, *unseen.stroke_shapes}
    names = [p.name.removesuffix(".nii.gz") for p in sorted((data_root() / "stroke_shapes").glob("*.nii.gz"))]
    sizes = {name: float(load_stroke_shape(name).array.sum()) for name in names if name not in used}
    return sorted(sizes, key=lambda name: -sizes[name])


def made_scans(config: Config) -> Iterator[MadeScan]:
    """Yield each validation scan as it is, with a small lesion, and every second one with a large stroke."""
    split = load_split(config.data.splits)
    strokes = stroke_shapes()
    for i, subject in enumerate(split.validation):
        volume = load_scan(config, subject).volume
        yield MadeScan(subject, HEALTHY, volume, np.zeros(volume.shape, np.bool_))
        shape = split.shapes_validation[i % len(split.shapes_validation)]
        small = insert_lesion(volume, load_lesion_shape(shape), CONTRASTS[i % 2], i)
        yield MadeScan(subject, SMALL, small.volume, small.truth)
        if i % STROKE_EVERY == 0:
            large = insert_lesion(volume, load_stroke_shape(strokes[i % len(strokes)]), min(CONTRASTS), i)
            yield MadeScan(subject, LARGE, large.volume, large.truth)


def measure(config: Config, manifest: Manifest, compute: AnomalyMap) -> list[Row]:
    """Return volume and Dice of the findings of each scan by each rule, on the slices of the model."""
    voxel_ml = manifest.preprocessing.voxel_ml
    rows = []
    for made in tqdm(made_scans(config), desc="scans", unit="scan"):
        case = make_case(made.subject, made.kind, made.volume, made.truth, manifest)
        anomaly = mask_map(compute(case), case)
        for name, rule in rules().items():
            settings = raise_thresholds(anomaly, manifest.residual, rule, voxel_ml)
            found = label_findings(anomaly, settings, voxel_ml)[0] > 0
            rows.append(
                {
                    "subject": made.subject,
                    "scanner": "IXI" if made.subject.startswith("IXI") else config.data.folder,
                    "kind": made.kind,
                    "rule": name,
                    "factor": round(settings.threshold / manifest.residual.threshold, 2),
                    "truth_ml": round(float(case.truth.sum()) * voxel_ml, 3),
                    "found_ml": round(float(found.sum()) * voxel_ml, 3),
                    "dice": round(dice(found, case.truth), 4),
                }
            )
    return rows


def page(bundle: str, rows: list[Row]) -> str:
    """Return the page of a measurement."""
    lines = []
    for scanner, name in itertools.product(dict.fromkeys(r["scanner"] for r in rows), rules()):
        of_rule = [r for r in rows if r["scanner"] == scanner and r["rule"] == name]
        kinds = {kind: [r for r in of_rule if r["kind"] == kind] for kind in (HEALTHY, SMALL, LARGE)}
        false_ml = [r["found_ml"] for r in kinds[HEALTHY]]
        lines.append(
            [
                scanner,
                name,
                f"{np.median(false_ml):.2f}",
                f"{np.percentile(false_ml, 90):.2f}",
                *(f"{np.mean([r['dice'] for r in kinds[kind]]):.3f}" for kind in (SMALL, LARGE)),
            ]
        )
    header = ["scanner", "rule", "false, ml: median", "90th percentile", f"Dice, {SMALL}", f"Dice, {LARGE}"]
    return (
        f"# Thresholds that a scan raises: {bundle}\n\n"
        "Written by `python -m training.experiments.scan_threshold CONFIG BUNDLE`. Validation subjects only. Dice is a "
        f"mean over scans. [{bundle}-scan-threshold.csv]({bundle}-scan-threshold.csv) has each scan.\n\n"
        f"{table(header, lines)}\n"
    )


def main() -> None:
    """Measure the rules and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("bundle", type=Path)
    options = parser.parse_args()
    bundle = load_bundle(options.bundle)
    compute = counterpart_map(bundle.networks.in_batches(BATCH, lambda _: None), bundle.manifest)
    rows = measure(Config.load(options.config), bundle.manifest, compute)
    path = ROOT / "docs" / "evaluation" / f"{bundle.manifest.id}-scan-threshold.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".md").write_text(page(bundle.manifest.id, rows))


if __name__ == "__main__":
    main()
