"""Evaluation of a T1 bundle on scanners that no training saw, and on real and large lesions.

The scans and shapes are those of training/splits/t1_unseen.json. They are the same for every version of a bundle.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from app.errors import CounterpartError
from app.pipeline.risk_control import found_volumes
from app.runtime.bundle import Bundle
from app.volume import BoolArray, Volume
from training.bundle_runs import (
    Row,
    analyse,
    extract_brain_if_needed,
    insert_into_head,
    ood_scores,
    run_detection,
    score_truth,
)
from training.config import Config, data_root
from training.data import Split, load_scan, load_volume
from training.lesion_insertion import (
    MS_TEST_PATIENTS,
    LesionedScan,
    insert_foreign_patch,
    insert_lesion,
    load_lesion_shape,
)
from training.unseen_scans import (
    UnseenList,
    healthy_heads,
    load_stroke_shape,
    load_unseen_head,
    load_unseen_list,
)

CONTRASTS = (0.35, -0.35)
SHAPES_PER_HEAD = 2
# Home test scans that get each large stroke.
SCANS_PER_STROKE = 3
# Labels of BRATS 2013: 1 necrosis, 2 oedema, 3 non-enhancing and 4 enhancing tumour.
BRATS_OEDEMA = 2
HOME = "home"
UNSEEN = "not in training"
INTENSITY = "intensity"
FOREIGN_PATCH = "foreign patch"


# Healthy brain -> brain with a lesion.
Inserter = Callable[[Volume], LesionedScan]


class Pathology(NamedTuple):
    """Scan with real or large lesions, and their outlines by name."""

    kind: str
    name: str
    volume: Volume
    truths: dict[str, BoolArray]


def evaluate_heads(_config: Config, bundle: Bundle, _split: Split) -> list[Row]:
    """Measure the findings in healthy T1 heads and brains of other scanners, or the reason of the refusal.

    Every number is measured on the grid of the file, as the service returns it.
    """
    rows = []
    for head in tqdm(healthy_heads(), desc="heads", unit="scan"):
        row: Row = {
            "kind": head.kind,
            "name": head.name,
            "person": head.person,
            "in_training": head.in_training,
            "known_from": head.known_from,
            "counted": head.counted,
            "voxel_mm": [round(float(mm), 2) for mm in head.volume.spacing],
        }
        try:
            volume = extract_brain_if_needed(head.volume, bundle)
            detection, result, seconds = run_detection(volume, bundle)
            volumes = found_volumes(detection, bundle.manifest, volume.voxel_ml)
            row |= {
                "outcome": "analysed",
                "skull_stripped": volume is head.volume,
                "found_ml": float(result.mask.sum()) * volume.voxel_ml,
                "findings": len(result.lesions),
                "largest_ml": result.lesions[0].volume_ml if result.lesions else 0.0,
                "seconds": round(seconds, 1),
                "volumes_ml": volumes.round(3).tolist(),
                **ood_scores(detection),
            }
        except CounterpartError as error:
            row |= {"outcome": error.code, "found": error.found}
        rows.append(row)
    return rows


def evaluate_unseen_lesions(config: Config, bundle: Bundle, split: Split) -> list[Row]:
    """Measure synthetic lesions in heads of scanners that no training saw, and foreign patches also at home.

    The part `lesions` has the other lesions at home, of the same shapes and contrasts.
    """
    unseen = load_unseen_list()
    rows = []
    for i, scan in enumerate(tqdm(unseen.people, desc="unseen", unit="scan")):
        head = load_unseen_head(scan).volume
        shapes = [split.shapes_test[(SHAPES_PER_HEAD * i + j) % len(split.shapes_test)] for j in range(SHAPES_PER_HEAD)]
        fields: Row = {"group": UNSEEN, "scanner": scan.scanner, "subject": scan.person, "seed": i}
        rows += [fields | row for row in _measure_insertions(head, bundle, insertions(shapes, unseen, i))]
    for i, subject in enumerate(tqdm(split.test, desc="foreign patches at home", unit="scan")):
        volume = load_scan(config, subject).volume
        fields = {"group": HOME, "scanner": HOME, "subject": subject, "seed": i}
        rows += [fields | row for row in _measure_insertions(volume, bundle, insertions([], unseen, i))]
    return rows


def insertions(shapes: Sequence[str], unseen: UnseenList, seed: int) -> list[tuple[Row, Inserter]]:
    """Return the lesions of one brain: each shape in both contrasts, and a foreign patch."""
    found: list[tuple[Row, Inserter]] = []
    for shape, contrast in itertools.product(shapes, CONTRASTS):
        labels = {"family": INTENSITY, "shape": shape, "contrast": contrast}
        found.append((labels, partial(insert_lesion, shape=load_lesion_shape(shape), contrast=contrast, seed=seed)))
    shape = unseen.patch_shapes[seed % len(unseen.patch_shapes)]
    labels = {"family": FOREIGN_PATCH, "shape": shape, "contrast": None}
    return [*found, (labels, partial(insert_foreign_patch, shape=load_stroke_shape(shape), seed=seed))]


def _measure_insertions(head: Volume, bundle: Bundle, lesions: Sequence[tuple[Row, Inserter]]) -> Iterator[Row]:
    """Yield the scores of each lesion. The service extracts the brain of a head anew, with the lesion in it.

    If no brain can be extracted from the healthy head, all its lesions are missed.
    """
    try:
        brain = extract_brain_if_needed(head, bundle)
    except CounterpartError as error:
        missed: Row = {"outcome": error.code, "dice": 0.0, "best_dice": 0.0, "lesions": ()}
        yield from (labels | missed for labels, _ in lesions)
        return
    for labels, insert in lesions:
        whole = insert_into_head(head, brain, insert(brain))
        analysis = analyse(whole.volume, bundle, extract=brain is not head)
        yield labels | score_truth(analysis, whole.truth, head.voxel_ml)


def evaluate_pathology(config: Config, bundle: Bundle, split: Split) -> list[Row]:
    """Measure whether scans with real and with large lesions are analysed, and the Dice with each outline."""
    rows = []
    for scan in tqdm(pathology_scans(config, split), desc="pathology", unit="scan"):
        analysis = analyse(scan.volume, bundle)
        for outline, truth in scan.truths.items():
            row: Row = {"kind": scan.kind, "name": scan.name, "outline": outline}
            rows.append(row | score_truth(analysis, truth, scan.volume.voxel_ml))
    return rows


def pathology_scans(config: Config, split: Split) -> Iterator[Pathology]:
    """Yield T1 of multiple sclerosis, contrast-enhanced T1 of tumours, and home test scans with large dark strokes."""
    yield from _multiple_sclerosis()
    yield from _tumours()
    for i, name in enumerate(load_unseen_list().stroke_shapes):
        for j in range(SCANS_PER_STROKE):
            subject = split.test[(SCANS_PER_STROKE * i + j) % len(split.test)]
            lesioned = insert_lesion(load_scan(config, subject).volume, load_stroke_shape(name), min(CONTRASTS), j)
            yield Pathology("stroke inserted dark", f"{name} in {subject}", lesioned.volume, {"stroke": lesioned.truth})


def _multiple_sclerosis() -> Iterator[Pathology]:
    folder = data_root() / "ms_open_ms_data"
    for patient in MS_TEST_PATIENTS:
        volume = load_volume(folder / f"{patient}_T1_mni_brain_u16.nii.gz")
        outline = load_lesion_shape(patient)
        assert np.allclose(outline.affine, volume.affine), "outline and scan have one grid"
        yield Pathology("multiple sclerosis, T1", patient, volume, {"lesions": outline.array > 0})


def _tumours() -> Iterator[Pathology]:
    for path in sorted((data_root() / "brats2013").glob("*_t1c_u8.nii.gz")):
        name = path.name.removesuffix("_t1c_u8.nii.gz")
        labels = load_volume(path.with_name(f"{name}_seg.nii.gz")).array
        core = (labels > 0) & (labels != BRATS_OEDEMA)
        truths = {"tumour with oedema": labels > 0, "tumour without oedema": core}
        yield Pathology("BRATS 2013, T1 with contrast agent", name, load_volume(path), truths)
