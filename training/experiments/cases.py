"""Test and validation cases: scans with a lesion, and its outline on the slices of the model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from app.manifest import Manifest
from app.pipeline.preprocess import Slices, analysed_slices, to_slices
from app.pipeline.scores import erode_foreground
from app.volume import BoolArray, FloatArray, Volume
from training.config import Config, data_root
from training.data import Split, load_scan, load_split, load_volume
from training.image_archive import tumour_scans
from training.lesion_insertion import (
    ELLIPSE_EVERY,
    MS_TEST_PATIENTS,
    LesionedScan,
    insert_ellipses,
    insert_lesion,
    load_lesion_shape,
)

Part = Literal["validation", "test"]

# Change of intensity of a synthetic lesion, as a share of the brain's robust range.
GRADES = {"grade 1": 0.10, "grade 2": 0.20, "grade 3": 0.35}
# Radii of ellipses, in pixels of the model.
RADIUS_PIXELS = (4.0, 8.0)
# Cases that choose a baseline's variant and smoothing.
VALIDATION_CASES = 12


@dataclass(frozen=True, eq=False)
class Case:
    """Scan for all methods, and the outline of its lesion.

    Attributes
    ----------
    subject : str
    kind : str
        Row or column of the tables.
    volume : Volume
    slices : Slices
    slice_indices : (M,) ndarray of int
        Indices of the evaluated slices.
    truth : (M, H, W) ndarray of bool
    evaluated : (M, H, W) ndarray of bool
        Foreground without its edge, the same for every method.
    """

    subject: str
    kind: str
    volume: Volume
    slices: Slices
    slice_indices: npt.NDArray[np.int64]
    truth: BoolArray
    evaluated: BoolArray

    @property
    def x(self) -> FloatArray:
        """The evaluated slices, (M, 1, H, W)."""
        return self.slices.x[self.slice_indices]

    @property
    def foreground(self) -> BoolArray:
        """Foreground of the evaluated slices, (M, H, W)."""
        return self.slices.foreground[self.slice_indices]


def make_case(
    subject: str,
    kind: str,
    volume: Volume,
    truth: BoolArray,
    manifest: Manifest,
    healthy: Callable[[Slices], BoolArray] | None = None,
) -> Case:
    """Make a case from a scan and its truth (X, Y, Z) on the scan's grid.

    Parameters
    ----------
    healthy : callable, optional
        Slices -> (N,) ndarray of bool: slices without an abnormality other than the truth. Other slices are not
        evaluated, because a tumour there would count as a false positive.
    """
    slices = to_slices(volume, manifest.preprocessing)
    known = analysed_slices(slices, manifest.preprocessing)
    if healthy is not None:
        known = known[healthy(slices)[known]]
    placed = slices.grid.sample_volume(truth.astype(np.float32))[known] > 0.5
    evaluated = erode_foreground(slices.foreground[known], manifest.residual.erosion)
    return Case(subject, kind, volume, slices, known, placed, evaluated)


# Subject, contrast, seed -> the scan with a lesion.
Insert = Callable[[str, float, int], LesionedScan]


def ellipse_inserter(config: Config) -> Insert:
    """Return a function that inserts ellipses of 4 to 8 pixels in radius into stacks of images."""
    assert config.data.image_archive is not None, "ellipses are for 2-D images"
    # A patient with a tumour has few healthy images, so each gets an ellipse.
    every = 1 if config.data.image_archive.kind == "lgg" else ELLIPSE_EVERY

    def insert(subject: str, contrast: float, seed: int) -> LesionedScan:
        radius = np.random.default_rng([seed, 13]).uniform(*RADIUS_PIXELS) * config.preprocessing.spacing_mm[1]
        volume = load_scan(config, subject).volume
        return insert_ellipses(volume, radius, contrast, seed, ct=config.preprocessing.window is not None, every=every)

    return insert


def shape_inserter(config: Config, part: Part) -> Insert:
    """Return a function that inserts lesion shapes of MS patients. Validation and test have different shapes."""
    split = load_split(config.data.splits)
    names = split.shapes_validation if part == "validation" else split.shapes_test

    def insert(subject: str, contrast: float, seed: int) -> LesionedScan:
        scan = load_scan(config, subject)
        return insert_lesion(scan.volume, load_lesion_shape(names[seed % len(names)]), contrast, seed)

    return insert


def synthetic(config: Config, manifest: Manifest, part: Part, signs: tuple[int, int] = (1, -1)) -> Iterator[Case]:
    """Yield synthetic lesions of each grade in healthy slices of each subject.

    Parameters
    ----------
    signs : tuple of int
        Signs of the contrast in alternating subjects: by default bright and dark.
    """
    split: Split = load_split(config.data.splits)
    subjects = split.validation if part == "validation" else split.test
    insert = ellipse_inserter(config) if config.data.image_archive is not None else shape_inserter(config, part)
    for grade, (kind, contrast) in enumerate(GRADES.items()):
        for i, subject in enumerate(subjects):
            made = insert(subject, contrast * signs[(i + grade) % 2], i)
            healthy = load_scan(config, subject).healthy_slices
            case = make_case(subject, kind, made.volume, made.truth, manifest, healthy)
            if len(case.slice_indices):  # a patient may have a tumour in every slice that is analysed
                yield case


def spread(cases: Sequence[Case], count: int) -> list[Case]:
    """Return `count` cases that are evenly spread over a list."""
    return [cases[i] for i in np.unique(np.linspace(0, len(cases) - 1, count).round().astype(int))]


def balanced(every: Iterable[Case], count: int) -> list[Case]:
    """Return `count` cases of each grade, half of them bright, evenly spread over the subjects."""
    found = list(every)
    of_grade = [[c for c in found if c.kind == kind] for kind in GRADES]
    # `synthetic` alternates the sign.
    return [case for mine in of_grade for sign in (mine[::2], mine[1::2]) for case in spread(sign, count // 2)]


def for_choices(config: Config, manifest: Manifest, signs: tuple[int, int] = (1, -1)) -> list[Case]:
    """Return validation cases of grade 2."""
    found = [c for c in synthetic(config, manifest, "validation", signs) if c.kind == "grade 2"]
    return spread(found, VALIDATION_CASES)


def tumours(config: Config, manifest: Manifest, part: Part = "test") -> Iterator[Case]:
    """Yield patients with outlined tumours, with all their slices."""
    split = load_split(config.data.splits)
    for scan in tumour_scans(config, split.validation if part == "validation" else split.test):
        yield make_case(scan.subject, "tumours", scan.volume, scan.truth, manifest)


def multiple_sclerosis(manifest: Manifest, sequence: Literal["T1", "FLAIR"]) -> Iterator[Case]:
    """Yield the two skull-stripped MS test patients with their consensus masks."""
    folder = data_root() / "ms_open_ms_data"
    for patient in MS_TEST_PATIENTS:
        volume = load_volume(folder / f"{patient}_{sequence}_mni_brain_u16.nii.gz")
        yield make_case(patient, f"MS lesions, {sequence}", volume, load_lesion_shape(patient).array > 0, manifest)


def brats(manifest: Manifest) -> Iterator[Case]:
    """Yield three skull-stripped FLAIR scans of high-grade gliomas. All four labels are tumour."""
    folder = data_root() / "brats2013"
    for path in sorted(folder.glob("*_flair_u8.nii.gz")):
        truth = load_volume(path.with_name(path.name.replace("flair_u8", "seg"))).array > 0
        name = path.name.removesuffix("_1_flair_u8.nii.gz")
        yield make_case(name, "BRATS 2013, FLAIR", load_volume(path), truth, manifest)


Cases = Callable[[Config, Manifest], Iterable[Case]]
# Experiments 2 and 3: part -> its bundle and its cases.
SEGMENTED: dict[str, tuple[str, Cases]] = {
    "ellipses": ("headct", lambda config, manifest: synthetic(config, manifest, "test")),
    "shapes": ("t1", lambda config, manifest: synthetic(config, manifest, "test")),
    "tumours": ("flair", tumours),
    "ms-t1": ("t1", lambda _, manifest: multiple_sclerosis(manifest, "T1")),
    "stripped": ("flair", lambda _, manifest: [*multiple_sclerosis(manifest, "FLAIR"), *brats(manifest)]),
}
