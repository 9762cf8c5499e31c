"""The frozen split by subject: drawn once, committed, and obeyed by every command.

`python -m training.splits` drew it, and refuses to draw it again. The test shapes are five of 2 ml
and more that span the sizes, and three smaller ones; they were named before any result was seen.
"""

import json
from pathlib import Path

import numpy as np

from app.manifest import Part
from training.config import data_root

SHAPES_TEST = ("patient08", "patient14", "patient20", "patient23", "patient27")
SHAPES_TEST_SMALL = ("patient03", "patient17", "patient29")
# Test cases of their own: their masks are not used as shapes.
NO_SHAPES = ("patient07", "patient19")

FOLDER = Path(__file__).parent / "splits"


class Split(Part):
    """Subjects of each part, and the patients whose lesions serve as shapes; none is in two parts."""

    source: str
    seed: int
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    shapes_validation: tuple[str, ...]
    shapes_test: tuple[str, ...]
    shapes_test_small: tuple[str, ...]


def load_split(name: str) -> Split:
    """Read a frozen split and check that no subject is in two parts."""
    split = Split.model_validate_json((FOLDER / name).read_text())
    everyone = split.train + split.validation + split.test
    assert len(set(everyone)) == len(everyone), "a subject is in two parts of the split"
    shapes = split.shapes_validation + split.shapes_test + split.shapes_test_small
    assert len(set(shapes)) == len(shapes), "a lesion shape is in two parts of the split"
    return split


def draw_t1(seed: int = 20261123) -> Split:
    """Draw the split of ds002748: 41 train, 9 validation, 10 test, and the two always-test subjects."""
    folder = data_root() / "t1_ds002748" / "volumes"
    subjects = sorted(p.name.split("_")[0] for p in folder.glob("sub-*_T1w.nii.gz"))
    shapes = data_root() / "ms_open_ms_data" / "gold_mni"
    patients = sorted(p.name.split("_")[0] for p in shapes.glob("patient*_gold.nii.gz"))
    order = np.random.default_rng(seed).permutation(len(subjects))
    drawn = [subjects[i] for i in order]
    return Split(
        source="ds002748",
        seed=seed,
        train=tuple(sorted(drawn[:41])),
        validation=tuple(sorted(drawn[41:50])),
        test=(*sorted(drawn[50:]), "sub-30", "sub-61"),
        shapes_validation=tuple(p for p in patients if p not in SHAPES_TEST + SHAPES_TEST_SMALL + NO_SHAPES),
        shapes_test=SHAPES_TEST,
        shapes_test_small=SHAPES_TEST_SMALL,
    )


if __name__ == "__main__":
    target = FOLDER / "t1_ds002748.json"
    if target.exists():
        raise SystemExit(f"{target.name} is frozen; results depend on it.")
    FOLDER.mkdir(exist_ok=True)
    target.write_text(json.dumps(draw_t1().model_dump(), indent=1) + "\n")
