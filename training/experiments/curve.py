"""Dice and AUPRC against evaluations of the network, on healthy validation subjects with synthetic lesions."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

import numpy as np
from tqdm import tqdm

from app.manifest import Manifest, View
from app.pipeline.networks import Networks
from app.runtime.bundle import load_bundle
from app.volume import FloatArray, IntArray
from training.calibrate import kl_threshold, significant
from training.config import Config
from training.data import load_scan
from training.examine import examine, make_schedule
from training.experiments import kept, methods
from training.experiments.cases import Case, synthetic
from training.experiments.experiment import Document, Experiment
from training.experiments.methods import BATCH
from training.experiments.metrics import Counts, average_precision, best_dice, interval
from training.experiments.opponents import bundle_folder
from training.experiments.segmentation import judged
from training.splits import load_split

PART = "curve"
# Of each bundle, so many cases: half of grade 2, half of grade 3.
CASES = {"t1": 4, "headct": 8}
KINDS = ("grade 2", "grade 3")
# A point this close to the best in both is as good.
CLOSE = 0.01


@dataclass(frozen=True)
class Point:
    """What a scan is asked; `views` of the bundle's own, in their order."""

    views: int
    kl: tuple[int, ...]
    reverse: tuple[int, ...]

    @property
    def label(self) -> str:
        """For tables, and to find it again."""
        levels = ", ".join(map(str, self.kl))
        return f"{self.views} view(s), KL at {levels}, back over {', '.join(map(str, self.reverse))}"


ONE, TWO = (20,), (50, 20)
EIGHT = (200, 160, 125, 95, 70, 50, 35, 20)
POINTS = (
    Point(1, (10,), ONE),
    Point(1, (10,), TWO),
    Point(1, (10,), EIGHT),
    Point(1, (5,), ONE),
    Point(1, (3,), ONE),
    Point(1, (3, 5, 10), ONE),
    Point(2, (5,), ONE),
    Point(4, (5,), ONE),
    Point(4, (3,), ONE),
    Point(4, (10,), TWO),
)


class Counting:
    """A bundle's networks, with how many slices the denoiser was asked of."""

    def __init__(self, models: Networks) -> None:
        self.evaluations = 0
        self._denoise = models.denoise
        self.networks = replace(models, denoise=self)

    def __call__(self, z_t: FloatArray, t: IntArray) -> FloatArray:
        self.evaluations += len(z_t)
        return self._denoise(z_t, t)


def shipped(manifest: Manifest) -> Point:
    """What the bundle does."""
    return Point(len(manifest.views), manifest.kl.timesteps, manifest.reverse.timesteps)


def changed(manifest: Manifest, point: Point, threshold: Callable[[tuple[int, ...]], float]) -> Manifest:
    """The manifest at one point; `threshold` says the KL threshold of other noise levels than its own."""
    kl = manifest.kl
    if point.kl != kl.timesteps:
        alpha_bar = make_schedule(manifest.schedule).alpha_bar
        ends = (float(alpha_bar[min(point.kl)]), float(alpha_bar[max(point.kl)]))
        kl = kl.model_copy(update={"timesteps": point.kl, "alpha_bar": ends, "threshold": threshold(point.kl)})
    reverse = manifest.reverse.model_copy(update={"timesteps": point.reverse})
    return manifest.model_copy(update={"views": manifest.views[: point.views], "kl": kl, "reverse": reverse})


def recalibrated(config: Config, models: Networks, percentile: float, levels: tuple[int, ...]) -> float:
    """The KL threshold at other noise levels: a percentile of healthy validation latents, as in calibration."""
    detection = config.detection.model_copy(update={"kl_timesteps": levels, "views": (View(),)})
    asked = config.model_copy(update={"detection": detection})
    subjects = load_split(config.data.splits).validation
    scans = [examine(load_scan(config, s), models, asked) for s in tqdm(subjects, desc=f"KL at {levels}", leave=False)]
    return significant(kl_threshold(scans, percentile))


def chosen_cases(every: Iterable[Case], count: int) -> list[Case]:
    """So many cases, half of each grade, evenly spread over the subjects and never one subject twice in a grade."""
    found = list(every)
    chosen = []
    for offset, kind in enumerate(KINDS):
        mine = [c for c in found if c.kind == kind]
        # The second grade begins elsewhere, so that bright and dark ones take turns.
        at = np.linspace(0, len(mine) - 1, count // len(KINDS)).round().astype(int)
        chosen += [mine[(i + offset) % len(mine)] for i in np.unique(at)]
    return chosen


def measure(models: Networks, manifest: Manifest, cases: list[Case]) -> Document:
    """One point on all cases: both grades together."""
    counting = Counting(models)
    maps = methods.ours(counting.networks, manifest)
    start = time.perf_counter()
    found = [maps(case) for case in cases]
    seconds = time.perf_counter() - start
    slices = sum(len(case.known) for case in cases)
    counts = Counts.of([judged(f, c) for f, c in zip(found, cases, strict=True)], [c.truth for c in cases])
    return {
        "evaluations_per_slice": counting.evaluations / slices,
        "seconds_per_slice": seconds / slices,
        "kl_threshold": manifest.kl.threshold,
        "dice": asdict(interval(counts, best_dice)),
        "auprc": asdict(interval(counts, average_precision)),
    }


def run(names: Iterable[str] = tuple(CASES), points: tuple[Point, ...] = POINTS) -> None:
    """Measure the points that are missing, bundle by bundle."""
    path = kept.RESULTS / f"{PART}.json"
    document = kept.read(PART) if path.exists() else {"bundles": {}}
    for name in names:
        e = Experiment(name)
        # In float32: the ranges of int8 were taken at the bundle's own noise levels.
        models = load_bundle(bundle_folder(e.config), quantised=False).networks.in_batches(BATCH, lambda _: None)
        now, own = e.provenance("validation"), shipped(e.manifest)
        known = document["bundles"].get(name, {})
        rows = known["points"] if kept.fits(known.get("provenance", {}), now) else {}
        # The bundle's own first: the page compares the others with it.
        wanted = [p for p in dict.fromkeys((own, *points)) if p.label not in rows]
        threshold = cache(partial(recalibrated, e.config, models, e.manifest.kl.percentile))
        if wanted:
            cases = chosen_cases(synthetic(e.config, e.manifest, "validation"), CASES[name])
        for point in tqdm(wanted, desc=name, unit="point"):
            manifest = changed(e.manifest, point, threshold)
            told = {"provenance": {key: now[key] for key in kept.OF_A_ROW}, "cases": len(cases)}
            rows[point.label] = asdict(point) | measure(models, manifest, cases) | told
            document["bundles"][name] = {"provenance": now, "shipped": own.label, "points": rows}
            kept.write(PART, document)
