"""Does the gate let large lesions in? It is to refuse what is foreign, and not who is very ill."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product

import numpy as np
from tqdm import tqdm

from app.errors import CounterpartError
from app.manifest import Manifest, View
from app.pipeline.detect import detect
from app.volume import Volume
from training.config import Config
from training.data import load_scan
from training.experiments import kept
from training.experiments.cases import GRADES, RADIUS_PIXELS
from training.experiments.experiment import Document, Experiment
from training.experiments.methods import LARGEST
from training.experiments.metrics import mean_interval
from training.lesions import Lesioned, gold_shape, insert_lesion, insert_sprites
from training.splits import Split, load_split

PART = "gate"
BUNDLES = ("t1", "headct")
LARGE_ML = 20.0
# METHOD's aim.
REFUSED_AT_MOST = 0.05
# In stacks of pictures: METHOD's largest ellipse in every so many of them, 25 to 200 ml in a head.
PICTURES_EVERY = (3, 2)
# Balls beside the real shapes, which are scattered: volume and centre in MNI space, in white matter.
BALLS_ML = (30.0, 60.0)
CENTRE_MM = (28.0, -20.0, 24.0)


def all_at_once(names: tuple[str, ...]) -> Volume:
    """Several patients' lesions in one brain; the masks share a grid."""
    shapes = [gold_shape(name) for name in names]
    assert all(np.allclose(s.affine, shapes[0].affine) for s in shapes), "masks on several grids"
    return Volume(np.max([s.array for s in shapes], axis=0), shapes[0].affine)


def ball(millilitres: float, like: Volume) -> Volume:
    """A ball of some volume, on the grid of a mask."""
    radius = (3 * millilitres * 1000 / (4 * np.pi)) ** (1 / 3)
    index = np.moveaxis(np.indices(like.shape), 0, -1)
    places = index @ like.affine[:3, :3].T + like.affine[:3, 3]
    inside = ((places - CENTRE_MM) ** 2).sum(axis=-1) <= radius**2
    return Volume(inside.astype(np.float32), like.affine)


def large_shapes(names: tuple[str, ...]) -> dict[str, Volume]:
    """What is inserted, by name."""
    sizes = {name: float(gold_shape(name).array.sum()) for name in names}
    largest = tuple(sorted(names, key=lambda name: -sizes[name])[:2])
    balls = {f"a ball of {ml:g} ml": ball(ml, gold_shape(names[0])) for ml in BALLS_ML}
    return {"the two largest shapes": all_at_once(largest), f"all {len(names)} shapes": all_at_once(names), **balls}


def alone(manifest: Manifest) -> Manifest:
    """A manifest that asks the gate and looks no further: no latent is masked, nothing is reversed."""
    kl = manifest.kl.model_copy(update={"threshold": LARGEST})
    return manifest.model_copy(update={"kl": kl, "views": (View(),)})


# Scan, contrast and seed -> the scan with a large lesion.
Insert = Callable[[Volume, float, int], Lesioned]


def inserts(config: Config, split: Split) -> dict[str, Insert]:
    """What is inserted into the scans of a bundle, by name."""
    if config.data.pictures is not None:
        radius = RADIUS_PIXELS[1] * config.preprocessing.spacing_mm[1]
        ct = config.preprocessing.window is not None

        def ellipses(every: int) -> Insert:
            return lambda volume, c, seed: insert_sprites(volume, radius, c, seed, ct=ct, every=every)

        return {f"ellipses of {radius:.0f} mm in one picture of {n}": ellipses(n) for n in PICTURES_EVERY}

    def of(shape: Volume) -> Insert:
        return lambda volume, c, seed: insert_lesion(volume, shape, c, seed)

    return {name: of(shape) for name, shape in large_shapes(split.shapes_test).items()}


def measure(e: Experiment, subjects: tuple[str, ...], shapes: dict[str, Insert]) -> Iterator[Document]:
    """Each shape, bright and dark, in each subject."""
    manifest = alone(e.manifest)
    cases = list(product(subjects, shapes, (1, -1)))
    for i, (subject, name, sign) in enumerate(tqdm(cases, desc="large lesions", unit="scan")):
        contrast = sign * GRADES["grade 3"]
        made = shapes[name](load_scan(e.config, subject).volume, contrast, i)
        row: Document = {"subject": subject, "shape": name, "contrast": contrast, "truth_ml": made.truth_ml}
        try:
            detect(made.volume, e.networks, manifest)
            yield row | {"outcome": "analysed"}
        except CounterpartError as error:
            yield row | {"outcome": error.code, "found": error.found}


def summary(rows: list[Document]) -> Document:
    """How many scans with a large lesion are refused, over subjects."""
    large = [r for r in rows if r["truth_ml"] >= LARGE_ML]
    refused = [r["outcome"] != "analysed" for r in large]
    by_subject = [
        float(np.mean([no for no, r in zip(refused, large, strict=True) if r["subject"] == s]))
        for s in sorted({r["subject"] for r in large})
    ]
    share = asdict(mean_interval(by_subject))
    return {"scans": len(large), "too_small": len(rows) - len(large), "refused": sum(refused), "share": share}


def run() -> None:
    """Measure the bundles whose numbers no longer count."""
    document: Document = kept.read(PART) if (kept.RESULTS / f"{PART}.json").exists() else {"bundles": {}}
    for name in BUNDLES:
        e = Experiment(name)
        now, known = e.provenance(), document["bundles"].get(name, {}).get("provenance", {})
        # Here it is the gate that counts, and not only what decides a map.
        if kept.fits(known, now) and known["bundle_sha256"] == now["bundle_sha256"]:
            continue
        split = load_split(e.config.data.splits)
        rows = list(measure(e, split.test, inserts(e.config, split)))
        document["bundles"][name] = {"provenance": now, "summary": summary(rows), "rows": rows}
        kept.write(PART, document)
