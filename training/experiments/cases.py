"""What the methods are tried on: scans with something to find, and where it is, on the slices of the model."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from app.manifest import Manifest
from app.pipeline import diffusion, residual
from app.pipeline.preprocess import Slices, analysed_slices, to_slices
from app.volume import BoolArray, FloatArray, Volume
from training.config import Config, data_root
from training.data import load_scan, load_volume
from training.lesions import SPRITE_EVERY, Lesioned, gold_shape, insert_lesion, insert_sprites
from training.splits import NO_SHAPES, Split, load_split
from training.tumours import tumour_scans

Part = Literal["validation", "test"]

# METHOD's grades: how far the intensity is moved, as a share of the brain's robust range.
GRADES = {"grade 1": 0.10, "grade 2": 0.20, "grade 3": 0.35}
# METHOD's radii for pictures of 64 x 64, in the pixels of the model.
RADIUS_PIXELS = (4.0, 8.0)
# On validation scans, what an opponent's post-processing is chosen by: enough of them.
VALIDATION_CASES = 12


@dataclass(frozen=True, eq=False)
class Case:
    """A scan as every method gets it, and the truth about it.

    Attributes
    ----------
    subject : str
        What a bootstrap draws.
    kind : str
        The line of the table that it belongs to.
    volume : Volume
        For the method that starts from a scan.
    slices : Slices
        For those that start from slices.
    known : (K,) ndarray of int
        The slices that are judged.
    truth : (K, H, W) ndarray of bool
    judged : (K, H, W) ndarray of bool
        The head without its edge, where a method may find something: alike for all.
    """

    subject: str
    kind: str
    volume: Volume
    slices: Slices
    known: npt.NDArray[np.int64]
    truth: BoolArray
    judged: BoolArray

    @property
    def x(self) -> FloatArray:
        """The judged slices, (K, 1, H, W)."""
        return self.slices.x[self.known]

    @property
    def foreground(self) -> BoolArray:
        """Of the judged slices, (K, H, W)."""
        return self.slices.foreground[self.known]


def make_case(
    subject: str,
    kind: str,
    volume: Volume,
    truth: BoolArray,
    manifest: Manifest,
    healthy: Callable[[Slices], BoolArray] | None = None,
) -> Case:
    """A case from a scan and its truth, (X, Y, Z) on the scan's grid.

    Parameters
    ----------
    healthy : callable, optional
        Which slices (N,) show nothing but the truth. The others are not judged: a tumour there would count as a
        false positive.
    """
    slices = to_slices(volume, manifest.preprocessing)
    known = analysed_slices(slices, manifest.preprocessing)
    if healthy is not None:
        known = known[healthy(slices)[known]]
    placed = slices.grid.sample_volume(truth.astype(np.float32))[known] > 0.5
    judged = residual.erode_foreground(slices.foreground[known], manifest.residual.erosion)
    return Case(subject, kind, volume, slices, known, placed, judged)


# Subject, contrast and seed -> the scan with a lesion.
Insert = Callable[[str, float, int], Lesioned]


def sprites(config: Config) -> Insert:
    """Ellipses in pictures, 4 to 8 pixels in radius."""
    assert config.data.pictures is not None, "sprites are for pictures"
    # Of a patient with a tumour few pictures are healthy: each of them gets one.
    every = 1 if config.data.pictures.kind == "lgg" else SPRITE_EVERY

    def insert(subject: str, contrast: float, seed: int) -> Lesioned:
        radius = np.random.default_rng([seed, 13]).uniform(*RADIUS_PIXELS) * config.preprocessing.spacing_mm[1]
        volume = load_scan(config, subject).volume
        return insert_sprites(volume, radius, contrast, seed, ct=config.preprocessing.window is not None, every=every)

    return insert


def shapes(config: Config, part: Part) -> Insert:
    """Lesions of MS patients, of the part's own shapes."""
    split = load_split(config.data.splits)
    names = split.shapes_validation if part == "validation" else split.shapes_test

    def insert(subject: str, contrast: float, seed: int) -> Lesioned:
        scan = load_scan(config, subject)
        return insert_lesion(scan.volume, gold_shape(names[seed % len(names)]), contrast, seed)

    return insert


def synthetic(config: Config, manifest: Manifest, part: Part) -> Iterator[Case]:
    """Synthetic lesions of each grade in the healthy slices of each subject of a part, bright and dark in turns."""
    split: Split = load_split(config.data.splits)
    subjects = split.validation if part == "validation" else split.test
    insert = sprites(config) if config.data.pictures is not None else shapes(config, part)
    for grade, (kind, contrast) in enumerate(GRADES.items()):
        for i, subject in enumerate(subjects):
            made = insert(subject, contrast * (-1) ** (i + grade), i)
            healthy = load_scan(config, subject).healthy_slices
            case = make_case(subject, kind, made.volume, made.truth, manifest, healthy)
            if len(case.known):  # a patient may have a tumour in every slice that is analysed
                yield case


def for_choices(config: Config, manifest: Manifest) -> list[Case]:
    """Validation cases of the middle grade, evenly spread over the subjects."""
    found = [c for c in synthetic(config, manifest, "validation") if c.kind == "grade 2"]
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, VALIDATION_CASES).round().astype(int))]


def tumours(config: Config, manifest: Manifest, part: Part = "test") -> Iterator[Case]:
    """Outlined tumours in all pictures of the patients of a part, those without one included."""
    split = load_split(config.data.splits)
    for scan in tumour_scans(config, split.validation if part == "validation" else split.test):
        yield make_case(scan.subject, "tumours", scan.volume, scan.truth, manifest)


def multiple_sclerosis(manifest: Manifest, sequence: Literal["T1", "FLAIR"]) -> Iterator[Case]:
    """The two MS patients that are test cases, skull-stripped, with their consensus masks."""
    folder = data_root() / "ms_open_ms_data"
    for patient in NO_SHAPES:
        volume = load_volume(folder / f"{patient}_{sequence}_mni_brain_u16.nii.gz")
        yield make_case(patient, f"MS lesions, {sequence}", volume, gold_shape(patient).array > 0, manifest)


def brats(manifest: Manifest) -> Iterator[Case]:
    """Three high-grade gliomas, skull-stripped FLAIR: every label of the four is tumour."""
    folder = data_root() / "brats2013"
    for path in sorted(folder.glob("*_flair_u8.nii.gz")):
        truth = load_volume(path.with_name(path.name.replace("flair_u8", "seg"))).array > 0
        name = path.name.removesuffix("_1_flair_u8.nii.gz")
        yield make_case(name, "BRATS 2013, FLAIR", load_volume(path), truth, manifest)


Cases = Callable[[Config, Manifest], Iterable[Case]]
# Experiments 2 and 3: part -> its bundle, and its cases.
SEGMENTED: dict[str, tuple[str, Cases]] = {
    "sprites": ("headct", lambda config, manifest: synthetic(config, manifest, "test")),
    "shapes": ("t1", lambda config, manifest: synthetic(config, manifest, "test")),
    "tumours": ("flair", tumours),
    "ms-t1": ("t1", lambda _, manifest: multiple_sclerosis(manifest, "T1")),
    "stripped": ("flair", lambda _, manifest: [*multiple_sclerosis(manifest, "FLAIR"), *brats(manifest)]),
}


def segmented(config: Config, manifest: Manifest) -> Iterator[Case]:
    """The cases of every part of a bundle."""
    for name, cases in SEGMENTED.values():
        if name == config.name:
            yield from cases(config, manifest)
