"""The shipped bundle on test subjects, which chose nothing: `python -m training.evaluate CONFIG`.

Writes docs/evaluation/NAME.json and .md, and puts the table into the README between its markers.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from app.errors import CounterpartError
from app.manifest import Manifest
from app.pipeline.brain_extraction import BrainExtraction, extract_brain
from app.pipeline.detect import Detection, detect, network_evaluations
from app.pipeline.findings import ScanResult, dice, to_scan_result
from app.runtime.bundle import Bundle, load_bundle
from app.volume import Volume
from training.config import ROOT, Config
from training.data import HealthyScan, load_scan
from training.foreign import all_foreign, heads
from training.lesions import Lesioned, gold_shape, insert_lesion, insert_sprites
from training.splits import Split, load_split
from training.tables import render
from training.tumour_scores import evaluate_tumours

GRADES = (0.35, -0.35)
SEEDS = range(5)
# In pictures: METHOD's 4 to 8 pixels are 15 to 30 mm across; the least is what the card says can be shown.
SPRITES_MM = (8.0, 12.0, 16.0)
# The bundle whose tables the README shows.
README_BUNDLE = "t1"
# A scan with fewer healthy slices may get no sprite at all in them.
LEAST_HEALTHY = 6
BATCH = 16

Row = dict[str, Any]


def best_dice(anomaly: npt.NDArray[np.float32], truth: npt.NDArray[np.bool_]) -> float:
    """Dice at the threshold that suits this very scan best: no honest threshold reaches it."""
    values = np.nan_to_num(anomaly)
    order = np.argsort(-values, axis=None, kind="stable")[: 20 * max(int(truth.sum()), 1)]
    hits = np.cumsum(truth.ravel()[order])
    sizes = np.arange(1, len(order) + 1)
    return float((2 * hits / (sizes + truth.sum())).max())


def run_detection(volume: Volume, bundle: Bundle) -> tuple[Detection, ScanResult, float]:
    """Detection, result and seconds of one scan."""
    start = time.perf_counter()
    models = bundle.networks.in_batches(BATCH, lambda _: None)
    detection = detect(volume, models, bundle.manifest)
    return detection, to_scan_result(volume, detection, bundle.manifest), time.perf_counter() - start


def evaluate_healthy(config: Config, bundle: Bundle, split: Split) -> list[Row]:
    """False-positive volume of every healthy test scan, and whether the gate lets it in."""
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
        # Of pictures, the slices with a tumour are none of the healthy ones.
        mask = result.mask[:, :, healthy]
        rows.append(
            {
                "subject": subject,
                "outcome": "analysed",
                "false_positive_ml": float(mask.sum()) * volume.voxel_ml,
                "healthy_slices": len(healthy),
                "findings": len(result.lesions),
                "score": detection.scores.scan,
                "typical": detection.scores.median_kl_range,
                "reconstruction": detection.scores.reconstruction,
                "fraction_out": detection.scores.outlier_fraction,
                "seconds": seconds,
                **evaluations(detection, bundle.manifest),
            }
        )
    return rows


def evaluations(detection: Detection, manifest: Manifest) -> Row:
    """What the network was asked."""
    slices = int(detection.analysed.sum())
    total = network_evaluations(manifest, slices, detection.reversed)
    return {"slices": slices, "slices_reversed": detection.reversed[0], "network_evaluations": total}


def shapes_of(config: Config, split: Split) -> dict[str, Callable[..., Lesioned]]:
    """By name, what inserts a lesion of some contrast and seed: real shapes, or sprites into pictures."""
    if config.data.pictures is not None:
        ct = config.bundle.modality == "CT"
        return {f"sprites of {mm:.0f} mm radius": partial(insert_sprites, radius_mm=mm, ct=ct) for mm in SPRITES_MM}
    return {name: partial(insert_lesion, shape=gold_shape(name)) for name in split.shapes_test}


def healthy_slices(scan: HealthyScan) -> npt.NDArray[np.int64]:
    """Indices of the slices without anything ill: all, but of pictures."""
    return np.flatnonzero(np.ones(scan.volume.shape[2]) if scan.healthy is None else scan.healthy)


def evaluate_lesions(config: Config, bundle: Bundle, split: Split) -> list[Row]:
    """Lesion shapes in healthy test scans: each shape and contrast in five scans."""
    shapes = shapes_of(config, split)
    subjects = [s for s in split.test if len(healthy_slices(load_scan(config, s))) >= LEAST_HEALTHY]
    cases = [
        (shape, contrast, seed, subjects[(5 * i + seed) % len(subjects)])
        for i, shape in enumerate(shapes)
        for contrast in GRADES
        for seed in SEEDS
    ]
    rows = []
    for shape, contrast, seed, subject in tqdm(cases, desc="lesions", unit="scan"):
        scan = load_scan(config, subject)
        made = shapes[shape](scan.volume, contrast=contrast, seed=seed)
        of = healthy_slices(scan)
        truth = made.truth[:, :, of]
        row: Row = {"shape": shape, "contrast": contrast, "seed": seed, "subject": subject}
        row["truth_ml"] = float(truth.sum()) * made.volume.voxel_ml
        try:
            _, result, _ = run_detection(made.volume, bundle)
            row |= {
                "outcome": "analysed",
                "dice": dice(result.mask[:, :, of] > 0, truth),
                "best_dice": best_dice(result.anomaly[:, :, of], truth),
            }
        except CounterpartError as error:
            row |= {"outcome": error.code, "dice": 0.0, "best_dice": 0.0}
        rows.append(row)
    return rows


def without_skull(volume: Volume, bundle: Bundle) -> Volume:
    """What serving analyses of a scan: for a bundle of brains alone, the brain that it takes out of a head."""
    if bundle.extractor is None:
        return volume
    brain = extract_brain(volume, bundle.extractor.networks)
    return brain.volume if isinstance(brain, BrainExtraction) else volume


def evaluate_heads(_config: Config, bundle: Bundle, _split: Split) -> list[Row]:
    """T1 with skull from other scanners: whether they are analysed, and what is found."""
    rows = []
    for head in tqdm(heads(), desc="heads", unit="scan"):
        row: Row = {"kind": head.kind, "name": head.name}
        try:
            volume = without_skull(head.volume, bundle)
            detection, result, _ = run_detection(volume, bundle)
            row |= {
                "outcome": "analysed",
                "found_ml": float(result.mask.sum()) * volume.voxel_ml,
                "findings": len(result.lesions),
                "typical": detection.scores.median_kl_range,
                "reconstruction": detection.scores.reconstruction,
                "fraction_out": detection.scores.outlier_fraction,
            }
        except CounterpartError as error:
            row |= {"outcome": error.code, "found": error.found}
        rows.append(row)
    return rows


def answer(volume: Volume, bundle: Bundle) -> str:
    """What happens to a scan: "analysed", or the code of the refusal."""
    try:
        run_detection(without_skull(volume, bundle), bundle)
    except CounterpartError as error:
        return error.code
    return "analysed"


def evaluate_foreign(config: Config, bundle: Bundle, _split: Split) -> list[Row]:
    """What happens to scans of another kind."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for foreign in tqdm(all_foreign(config), desc="foreign", unit="scan"):
        outcomes[foreign.kind][answer(foreign.volume, bundle)] += 1
    return [{"kind": kind, "outcomes": dict(count)} for kind, count in outcomes.items()]


def evaluate_single(config: Config, bundle: Bundle, split: Split) -> list[Row]:
    """What happens to healthy test pictures that come alone: a gate of stacks may refuse each of them."""
    outcomes: Counter[str] = Counter()
    for subject in tqdm(split.test, desc="single", unit="scan"):
        scan = load_scan(config, subject)
        for z in healthy_slices(scan):
            outcomes[answer(Volume(scan.volume.array[:, :, z : z + 1], scan.volume.affine), bundle)] += 1
    return [{"kind": "healthy test pictures, each by itself", "outcomes": dict(outcomes)}]


PARTS: dict[str, Callable[[Config, Bundle, Split], list[Row]]] = {
    "healthy": evaluate_healthy,
    "lesions": evaluate_lesions,
    "heads": evaluate_heads,
    "foreign": evaluate_foreign,
    "single": evaluate_single,
    "tumours": evaluate_tumours,
}


# Parts that not every bundle has data for: run when they are named, and again when they have been.
BY_NAME = ("heads", "tumours", "single")


def main(path: Path, parts: Sequence[str]) -> None:
    """Evaluate some parts anew, and write every table again."""
    config = Config.load(path)
    bundle = load_bundle(ROOT / "models" / f"{config.name}-{config.version}")
    split = load_split(config.data.splits)
    folder = ROOT / "docs" / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{config.name}.json"
    document: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    of_its_kind = (part for part in PARTS if part not in BY_NAME or document.get(part))
    for part in parts or tuple(of_its_kind):
        document[part] = {"bundle_sha256": bundle.sha256, "rows": PARTS[part](config, bundle, split)}
        target.write_text(json.dumps(document, indent=1) + "\n")
    # The README has the tables of the bundle that ships for everyone.
    readme = ROOT / "README.md" if config.name == README_BUNDLE else None
    render(document, bundle.manifest, target.with_suffix(".md"), readme, bundle.sha256)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
