"""The frozen splits by subject: drawn once, committed, and obeyed by every command.

`python -m training.splits NAME` drew each, and refuses to draw it again. Of the lesion shapes, those for
testing are five of 2 ml and more that span the sizes, and three smaller ones; they were named before any
result was seen.
"""

import json
import sys
from pathlib import Path

import numpy as np

from app.manifest import FrozenModel
from training.config import data_root
from training.pictures import BLOCK, block_name, read_lgg

SHAPES_TEST = ("patient08", "patient14", "patient20", "patient23", "patient27")
SHAPES_TEST_SMALL = ("patient03", "patient17", "patient29")
# Test cases of their own: their masks are not used as shapes.
NO_SHAPES = ("patient07", "patient19")

# MedNIST: parts of the split are runs of so many blocks of consecutive files.
HEADCT_FILES, RUN = 9000, 15
# Of a patient that is learnt from, slices with no tumour in them or beside them.
LEAST_HEALTHY = 2

FOLDER = Path(__file__).parent / "splits"


class Split(FrozenModel):
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


def draw_headct(seed: int = 20261123) -> Split:
    """Draw the split of MedNIST HeadCT by runs of files: a patient's slices lie together, with no mark at their end.

    Of 1,500 slices that show something, 75 % have their nearest neighbour within 33 files and hardly any at 35 to 99
    (`scripts.headct_window`): a patient fills at most that many. So one block of 40 files is dropped wherever
    two parts meet.
    """
    runs = HEADCT_FILES // (BLOCK * RUN)
    parts = np.array(["train"] * (runs - 4) + ["validation"] * 2 + ["test"] * 2)
    drawn = parts[np.random.default_rng(seed).permutation(runs)]
    blocks: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for run, part in enumerate(drawn):
        border = run > 0 and drawn[run - 1] != part
        first = run * RUN + border
        blocks[str(part)] += [block_name(b * BLOCK) for b in range(first, (run + 1) * RUN)]
    return _without_shapes("MedNIST HeadCT", seed, {part: tuple(names) for part, names in blocks.items()})


def draw_lgg(seed: int = 20261123) -> Split:
    """Draw the split of TCGA-LGG by patient: 12 validation, 20 test and who has no healthy slice, the rest train."""
    pictures = read_lgg(data_root() / "lgg_flair" / "lgg_flair_192_u8.npz", frozenset())
    owners = np.array(pictures.subjects)
    everyone = sorted(set(pictures.subjects))
    usable = [p for p in everyone if (pictures.healthy & (owners == p)).sum() >= LEAST_HEALTHY]
    drawn = [usable[i] for i in np.random.default_rng(seed).permutation(len(usable))]
    parts = {
        "train": drawn[32:],
        "validation": drawn[:12],
        "test": drawn[12:32] + [p for p in everyone if p not in usable],
    }
    return _without_shapes("TCGA-LGG FLAIR", seed, {part: tuple(sorted(names)) for part, names in parts.items()})


def _without_shapes(source: str, seed: int, parts: dict[str, tuple[str, ...]]) -> Split:
    none: dict[str, tuple[str, ...]] = dict.fromkeys(("shapes_validation", "shapes_test", "shapes_test_small"), ())
    return Split(source=source, seed=seed, **parts, **none)


DRAW = {"t1_ds002748": draw_t1, "headct": draw_headct, "lgg_flair": draw_lgg}


if __name__ == "__main__":
    target = FOLDER / f"{sys.argv[1]}.json"
    if target.exists():
        raise SystemExit(f"{target.name} is frozen; results depend on it.")
    FOLDER.mkdir(exist_ok=True)
    target.write_text(json.dumps(DRAW[sys.argv[1]]().model_dump(), indent=1) + "\n")
