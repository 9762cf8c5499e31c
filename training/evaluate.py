"""Evaluation of a finished bundle on test subjects, which were not used for any decision.

The command writes docs/evaluation/NAME.json and NAME.md. Without named parts, all parts of the
configuration are measured.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from app.errors import CounterpartError
from app.pipeline.detect import network_evaluations
from app.runtime.bundle import Bundle, load_bundle
from app.volume import Volume
from training.bundle_runs import Row, analyse, ood_scores, run_detection, score_truth
from training.config import ROOT, Config, EvaluationPart
from training.data import HealthyScan, Split, load_scan, load_split
from training.evaluate_haemorrhage import evaluate_haemorrhage
from training.evaluate_tumours import evaluate_tumours
from training.evaluate_unseen import evaluate_heads, evaluate_pathology, evaluate_unseen_lesions
from training.evaluation_page import evaluation_page
from training.external_scans import foreign_scans
from training.lesion_insertion import LesionedScan, insert_ellipses, insert_lesion, load_lesion_shape

EVALUATION = ROOT / "docs" / "evaluation"
CONTRASTS = (0.35, -0.35)
SEEDS = range(5)
# Radii of the ellipses in stacks of images. The smallest is near the limit of what the model card gives as visible.
ELLIPSES_MM = (8.0, 12.0, 16.0)
# With fewer healthy slices, a stack may get no ellipse at all.
MIN_HEALTHY_SLICES = 6


def healthy_slices(scan: HealthyScan) -> npt.NDArray[np.int64]:
    """Return the indices of the healthy slices: all slices of a volume."""
    return np.flatnonzero(np.ones(scan.volume.shape[2]) if scan.healthy is None else scan.healthy)


def evaluate_healthy(config: Config, bundle: Bundle, split: Split) -> list[Row]:
    """Measure the false-positive volume of every healthy test scan, or the reason of its refusal."""
    rows = []
    for subject in tqdm(split.test, desc="healthy", unit="scan"):
        scan = load_scan(config, subject)
        volume = scan.volume
        healthy = healthy_slices(scan)
        if not len(healthy):
            rows.append({"subject": subject, "outcome": "no_healthy_slice"})
            continue
        try:
            detection, result, seconds = run_detection(volume, bundle)
        except CounterpartError as error:
            rows.append({"subject": subject, "outcome": error.code})
            continue
        slices = int(detection.analysed.sum())
        rows.append(
            {
                "subject": subject,
                "outcome": "analysed",
                "false_positive_ml": float(result.mask[:, :, healthy].sum()) * volume.voxel_ml,
                "healthy_slices": len(healthy),
                "findings": len(result.lesions),
                "score": detection.scores.scan,
                **ood_scores(detection),
                "seconds": seconds,
                "slices": slices,
                "slices_reversed": detection.reversed_slices[0],
                "network_evaluations": network_evaluations(bundle.manifest, slices, detection.reversed_slices),
            }
        )
    return rows


def lesion_inserters(config: Config, split: Split) -> dict[str, Callable[..., LesionedScan]]:
    """Return functions of volume, contrast and seed by name: real shapes for volumes, ellipses for stacks of images."""
    if config.data.image_archive is not None:
        ct = config.bundle.modality == "CT"
        return {f"ellipses of {mm:.0f} mm radius": partial(insert_ellipses, radius_mm=mm, ct=ct) for mm in ELLIPSES_MM}
    return {name: partial(insert_lesion, shape=load_lesion_shape(name)) for name in split.shapes_test}


def evaluate_lesions(config: Config, bundle: Bundle, split: Split) -> list[Row]:
    """Measure the Dice of synthetic lesions in healthy test scans, for each shape and contrast in five scans."""
    inserters = lesion_inserters(config, split)
    subjects = [s for s in split.test if len(healthy_slices(load_scan(config, s))) >= MIN_HEALTHY_SLICES]
    cases = [
        (shape, contrast, seed, subjects[(5 * i + seed) % len(subjects)])
        for i, shape in enumerate(inserters)
        for contrast in CONTRASTS
        for seed in SEEDS
    ]
    rows = []
    for shape, contrast, seed, subject in tqdm(cases, desc="lesions", unit="scan"):
        scan = load_scan(config, subject)
        lesioned = inserters[shape](scan.volume, contrast=contrast, seed=seed)
        healthy = healthy_slices(scan)
        row: Row = {"shape": shape, "contrast": contrast, "seed": seed, "subject": subject}
        analysis = analyse(lesioned.volume, bundle, extract=False)
        row |= score_truth(analysis, lesioned.truth, lesioned.volume.voxel_ml, healthy)
        rows.append(row)
    return rows


def evaluate_foreign(config: Config, bundle: Bundle, _split: Split) -> list[Row]:
    """Count the outcomes of scans outside the training distribution."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for scan in tqdm(foreign_scans(config), desc="foreign", unit="scan"):
        outcomes[scan.kind][analyse(scan.volume, bundle).outcome] += 1
    return [{"kind": kind, "outcomes": dict(count)} for kind, count in outcomes.items()]


def evaluate_single(config: Config, bundle: Bundle, split: Split) -> list[Row]:
    """Count the outcomes of healthy test images that are sent as single slices."""
    outcomes: Counter[str] = Counter()
    for subject in tqdm(split.test, desc="single", unit="scan"):
        scan = load_scan(config, subject)
        for z in healthy_slices(scan):
            image = Volume(scan.volume.array[:, :, z : z + 1], scan.volume.affine)
            outcomes[analyse(image, bundle).outcome] += 1
    return [{"kind": "healthy test images, each as a single slice", "outcomes": dict(outcomes)}]


PARTS: dict[EvaluationPart, Callable[[Config, Bundle, Split], list[Row]]] = {
    "healthy": evaluate_healthy,
    "lesions": evaluate_lesions,
    "heads": evaluate_heads,
    "unseen_lesions": evaluate_unseen_lesions,
    "pathology": evaluate_pathology,
    "foreign": evaluate_foreign,
    "single": evaluate_single,
    "tumours": evaluate_tumours,
    "haemorrhage": evaluate_haemorrhage,
}


def evaluate(
    config: Config, parts: Sequence[EvaluationPart] = (), folder: Path = EVALUATION, bundle_folder: Path | None = None
) -> None:
    """Measure some parts again, or all parts of the configuration, and write the page of the bundle.

    Parameters
    ----------
    config : Config
    parts : sequence of str
    folder : Path
        Folder of the result and its page.
    bundle_folder : Path, optional
        Another bundle, which is measured on the data of the configuration.
    """
    bundle = load_bundle(bundle_folder or config.bundle_folder)
    split = load_split(config.data.splits)
    path = folder / f"{config.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in parts or config.evaluation.parts:
        document[part] = {"bundle_sha256": bundle.sha256, "rows": PARTS[part](config, bundle, split)}
        path.write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text(
        evaluation_page(document, bundle.manifest, bundle.sha256, config.evaluation.scope)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="configuration, e.g. training/configs/t1.toml")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"one of {', '.join(get_args(EvaluationPart))}")
    parser.add_argument("--output", type=Path, default=EVALUATION, metavar="FOLDER", help="default: docs/evaluation")
    parser.add_argument("--bundle", type=Path, metavar="FOLDER", help="another bundle, with --output")
    options = parser.parse_args()
    if options.bundle and options.output == EVALUATION:
        parser.error("--bundle needs --output, because docs/evaluation has the bundle of each configuration")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}")
    evaluate(Config.load(options.config), options.parts, options.output, options.bundle)
