"""Refusals of scans with a large lesion by the out-of-distribution check, which must accept patients."""

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
from tqdm import tqdm

from app.errors import CounterpartError
from app.pipeline.methods import METHODS
from app.volume import Volume
from training.config import Config
from training.data import Split, load_scan, load_split
from training.experiments import results_cache
from training.experiments.cases import GRADES, RADIUS_PIXELS
from training.experiments.experiment import Experiment
from training.experiments.manifests import only_ood_check, ood_hash
from training.experiments.metrics import mean_interval
from training.experiments.results import ByBundle, LargeLesion, LargeLesionScores, OodProvenance
from training.lesion_insertion import LesionedScan, insert_ellipses, insert_lesion, load_lesion_shape

PART = "ood"
BUNDLES = ("t1", "headct")
LARGE_ML = 20.0
# In stacks of images: the largest ellipse in every third or second image, 25 to 200 ml in a head.
IMAGES_EVERY = (3, 2)
# Balls, because the lesion shapes are scattered: volume, and centre in white matter in MNI space.
BALLS_ML = (30.0, 60.0)
CENTRE_MM = (28.0, -20.0, 24.0)

# Scan, contrast, seed -> the scan with a large lesion.
Insert = Callable[[Volume, float, int], LesionedScan]


def merge_shapes(names: tuple[str, ...]) -> Volume:
    """Return several patients' lesions in one mask. The masks share a grid."""
    shapes = [load_lesion_shape(name) for name in names]
    assert all(np.allclose(s.affine, shapes[0].affine) for s in shapes), "masks on several grids"
    return Volume(np.max([s.array for s in shapes], axis=0), shapes[0].affine)


def make_ball(millilitres: float, like: Volume) -> Volume:
    """Return a ball of a given volume on the grid of a mask."""
    radius = (3 * millilitres * 1000 / (4 * np.pi)) ** (1 / 3)
    index = np.moveaxis(np.indices(like.shape), 0, -1)
    points = index @ like.affine[:3, :3].T + like.affine[:3, 3]
    inside = ((points - CENTRE_MM) ** 2).sum(axis=-1) <= radius**2
    return Volume(inside.astype(np.float32), like.affine)


def large_shapes(names: tuple[str, ...]) -> dict[str, Volume]:
    """Return large lesion masks by name."""
    sizes = {name: float(load_lesion_shape(name).array.sum()) for name in names}
    largest = tuple(sorted(names, key=lambda name: -sizes[name])[:2])
    balls = {f"a ball of {ml:g} ml": make_ball(ml, load_lesion_shape(names[0])) for ml in BALLS_ML}
    return {"the two largest shapes": merge_shapes(largest), f"all {len(names)} shapes": merge_shapes(names), **balls}


def make_inserters(config: Config, split: Split) -> dict[str, Insert]:
    """Return functions that insert a large lesion into the scans of a bundle, by name."""
    if config.data.image_archive is not None:
        radius = RADIUS_PIXELS[1] * config.preprocessing.spacing_mm[1]
        ct = config.preprocessing.window is not None

        def ellipses(every: int) -> Insert:
            return lambda volume, c, seed: insert_ellipses(volume, radius, c, seed, ct=ct, every=every)

        return {f"ellipses of {radius:.0f} mm in one picture of {n}": ellipses(n) for n in IMAGES_EVERY}

    def lesion(shape: Volume) -> Insert:
        return lambda volume, c, seed: insert_lesion(volume, shape, c, seed)

    return {name: lesion(shape) for name, shape in large_shapes(split.shapes_test).items()}


def measure(experiment: Experiment, subjects: tuple[str, ...], inserters: dict[str, Insert]) -> Iterator[LargeLesion]:
    """Yield the answer for each lesion, bright and dark, in each subject."""
    manifest = only_ood_check(experiment.manifest)
    cases = list(product(subjects, inserters, (1, -1)))
    for i, (subject, shape, sign) in enumerate(tqdm(cases, desc="large lesions", unit="scan")):
        contrast = sign * GRADES["grade 3"]
        made = inserters[shape](load_scan(experiment.config, subject).volume, contrast, i)
        try:
            METHODS[manifest.method](made.volume, experiment.networks, manifest)
            outcome = "analysed"
        except CounterpartError as error:
            outcome = error.code
        yield LargeLesion(subject=subject, shape=shape, contrast=contrast, truth_ml=made.truth_ml, outcome=outcome)


def summarise(rows: list[LargeLesion], provenance: OodProvenance) -> LargeLesionScores:
    """Return the share of refused scans among those with a large lesion, with its interval over subjects."""
    large = [row for row in rows if row.truth_ml >= LARGE_ML]
    by_subject: dict[str, list[bool]] = {}
    for row in large:
        by_subject.setdefault(row.subject, []).append(row.outcome != "analysed")
    return LargeLesionScores(
        provenance=provenance,
        scans=len(large),
        too_small=len(rows) - len(large),
        refused=sum(map(sum, by_subject.values())),
        share=mean_interval([float(np.mean(by_subject[subject])) for subject in sorted(by_subject)]),
        rows=tuple(rows),
    )


def run() -> None:
    """Measure the bundles whose stored answers are not valid."""
    stored = results_cache.load(PART, ByBundle[LargeLesionScores])
    bundles = dict(stored.bundles) if stored else {}
    for name in BUNDLES:
        experiment = Experiment(name)
        now = OodProvenance(**experiment.provenance().model_dump(), ood_sha256=ood_hash(experiment.manifest))
        known = bundles[name].provenance if name in bundles else None
        if known is not None and results_cache.is_valid(known, now) and known.ood_sha256 == now.ood_sha256:
            continue
        split = load_split(experiment.config.data.splits)
        rows = list(measure(experiment, split.test, make_inserters(experiment.config, split)))
        bundles[name] = summarise(rows, now)
        results_cache.save(PART, ByBundle[LargeLesionScores](bundles=bundles))
