"""What each choice does: METHOD's candidates on healthy validation subjects with synthetic lesions.

These choose a configuration's [detection], and the test subjects then judge that choice. The tumours of validation
patients are shown for `flair`; real lesions choose nothing.
"""

import time
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
from tqdm import tqdm

from app.manifest import Manifest
from app.pipeline.networks import Networks
from app.runtime.bundle import load_bundle
from app.volume import FloatArray
from training.calibrate import apart, residual_settings, significant
from training.config import Config
from training.data import load_scan
from training.experiments import kept
from training.experiments.bounds import spread_cases
from training.experiments.candidates import AS_SHIPPED, Candidate, Remembering, candidates
from training.experiments.cases import Case, make_case, synthetic, tumours
from training.experiments.experiment import Document, Experiment
from training.experiments.methods import BATCH
from training.experiments.metrics import Counts, average_precision, best_dice, difference, interval, mean_interval
from training.experiments.opponents import bundle_folder
from training.experiments.segmentation import judged, shipped_dice
from training.splits import load_split

PART = "ablation"
# Of each bundle, so many cases of each grade.
CASES = {"t1": 4, "headct": 8, "flair": 6}
# A gain is told over these grades together.
POOLED = ("grade 2", "grade 3")
OF = {"auprc": average_precision, "dice": best_dice}
# The rule of the thresholds: millilitres in the median healthy scan, and how far down a finding reaches.
FALSE_POSITIVE_ML = (0.5, 1.0, 2.0)
EXTENT_SHARES = (1.0, 0.8, 0.6, 0.4)


def measure(cases: list[Case], tried: dict[str, Candidate], models: Networks) -> tuple[Document, list[FloatArray]]:
    """AUPRC and best-achievable Dice of each candidate, by kind of case; and the maps as shipped."""
    remembering = Remembering(models)
    found: dict[str, list[FloatArray]] = {name: [] for name in tried}
    for case in tqdm(cases, desc="candidates", unit="scan"):
        remembering.forget()
        for name, candidate in tried.items():
            found[name].append(judged(candidate.map(case, remembering.networks), case))
    kinds: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        kinds.setdefault(case.kind, []).append(i)
    kinds[" and ".join(POOLED)] = [i for i, case in enumerate(cases) if case.kind in POOLED]
    rows: Document = {}
    for kind, mine in kinds.items():
        truths = [cases[i].truth for i in mine]
        counts = {name: Counts.of([maps[i] for i in mine], truths) for name, maps in found.items()}
        for name, own in counts.items():
            told: Document = {key: asdict(interval(own, of)) for key, of in OF.items()}
            if name != AS_SHIPPED:
                told["gain"] = {key: asdict(difference(own, counts[AS_SHIPPED], of)) for key, of in OF.items()}
            rows.setdefault(kind, {})[name] = told | {"cases": len(mine)}
    return rows, found[AS_SHIPPED]


def healthy_cases(config: Config, manifest: Manifest) -> Iterable[Case]:
    """Healthy validation scans, with nothing to find."""
    for subject in load_split(config.data.splits).validation:
        scan = load_scan(config, subject)
        nothing = np.zeros(scan.volume.shape, np.bool_)
        case = make_case(subject, "healthy", scan.volume, nothing, manifest, scan.healthy_slices)
        if len(case.known):
            yield case


def thresholds(
    config: Config, manifest: Manifest, healthy: list[FloatArray], cases: list[Case], found: list[FloatArray]
) -> list[Document]:
    """Dice of the mask itself, for each rule that makes thresholds from healthy maps.

    Parameters
    ----------
    healthy, found : list of (K, H, W) ndarray
        Anomaly maps of healthy validation scans and of the cases, as shipped.
    """
    maps = [apart(each) for each in healthy] if config.data.pictures is not None else healthy
    own, rows = manifest.residual, []
    for ml in FALSE_POSITIVE_ML:
        for share in EXTENT_SHARES:
            rule = {"false_positive_ml": ml, "extent_share": share}
            asked = config.model_copy(update={"detection": config.detection.model_copy(update=rule)})
            settings = residual_settings(maps, asked)
            at = manifest.model_copy(update={"residual": settings})
            dices: dict[str, list[float]] = {}
            for values, case in zip(found, cases, strict=True):
                dices.setdefault(case.kind, []).append(shipped_dice(values, case, at))
            told = {kind: asdict(mean_interval(each)) for kind, each in dices.items()}
            shipped = (ml, share) == (own.healthy_false_positive_ml, significant(own.extent_threshold / own.threshold))
            rows.append(rule | {"threshold": settings.threshold, "dice": told, "shipped": shipped})
    return rows


def bundle_cases(config: Config, manifest: Manifest, count: int) -> list[Case]:
    """So many of each grade; for tumours, validation patients too, who choose nothing."""
    cases = spread_cases(synthetic(config, manifest, "validation"), count)
    if config.data.pictures is not None and config.data.pictures.kind == "lgg":
        cases += [case for case in tumours(config, manifest, "validation") if case.truth.any()]
    return cases


def run(names: Iterable[str] = tuple(CASES)) -> None:
    """Measure the bundles whose numbers no longer count; each has a document of its own."""
    for name in names:
        e = Experiment(name)
        part, now = f"{PART}-{name}", e.provenance("validation")
        if (kept.RESULTS / f"{part}.json").exists() and kept.fits(kept.read(part)["provenance"], now):
            continue
        start = time.perf_counter()
        # In float32: the ranges of int8 were taken at the bundle's own noise levels.
        models = load_bundle(bundle_folder(e.config), quantised=False).networks.in_batches(BATCH, lambda _: None)
        tried = candidates(e.manifest, e.config, models)
        cases = bundle_cases(e.config, e.manifest, CASES[name])
        kinds, found = measure(cases, tried, models)
        own = tried[AS_SHIPPED]
        quiet = [judged(own.map(c, models), c) for c in tqdm(healthy_cases(e.config, e.manifest), desc="healthy")]
        told = {"provenance": now, "whole_seconds": time.perf_counter() - start}
        kept.write(part, told | {"kinds": kinds, "thresholds": thresholds(e.config, e.manifest, quiet, cases, found)})
