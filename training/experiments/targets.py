"""Targets that were set before anything was measured, and whether the stored results meet them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from training.config import ROOT, Config
from training.experiments.methods import COUNTERPART, ENSEMBLE, METHOD_INFO, TRANSFORMER
from training.experiments.metrics import Interval, mean_interval
from training.experiments.results import ImageLevelResults, SegmentationResults

# AUROC of images of other body parts, and of near images.
FAR = ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand")
FAR_AUROC, NEAR_AUROC = 0.99, 0.90
# Synthetic T1 lesions of this grade and size.
GRADE, T1_DICE, T1_AUPRC, LEAST_ML = "grade 2", 0.70, 0.75, 2.0
TUMOUR_DICE, SHIPPED_WITHIN = 0.65, 0.08
TIMED = ("ellipses", "shapes", "tumours")
TIMES = 50.0


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes
    ----------
    text, found : str
        Target and measured value, or the reason why nothing was measured.
    met : bool or None
        None if it was not measured.
    """

    text: str
    found: str
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """The verdict as text."""
        return "not measured" if self.met is None else "met" if self.met else "**missed**"


@dataclass(frozen=True)
class Measured:
    """Stored results that targets are compared with. A part that did not run is missing.

    Attributes
    ----------
    image_level : ImageLevelResults, optional
    segmented : dict of str to SegmentationResults
        Results of each part.
    tumours : dict, optional
        Row of docs/evaluation/flair.json over all tumour patients: intervals as [value, low, high].
    """

    image_level: ImageLevelResults | None
    segmented: Mapping[str, SegmentationResults]
    tumours: Mapping[str, Any] | None


def compare_targets(measured: Measured) -> list[Target]:
    """Compare every target with the stored results."""
    leads = [target for part, results in measured.segmented.items() for target in _leads(part, results)]
    return [
        *_image_level(measured.image_level),
        *leads,
        *_t1(measured.segmented.get("shapes")),
        *_tumours(measured),
        *(target for part in TIMED for target in _times(part, measured.segmented.get(part))),
    ]


def at_least(text: str, least: float, found: Interval | None) -> Target:
    """Compare a number with the smallest value that meets the target."""
    text = f"{text} >= {least:.2f}"
    if found is None or not math.isfinite(found.value):
        return Target(text, "no result")
    return Target(text, f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]", found.value >= least)


def _image_level(results: ImageLevelResults | None) -> Iterator[Target]:
    own = results.methods.get(COUNTERPART) if results else None
    kinds = own.kinds if own else {}
    # The targets do not name a score, so two are compared.
    for score, attribute in (("chosen score", "auroc"), ("mean KL", "mean_kl_auroc")):
        for kind, least in (*((kind, FAR_AUROC) for kind in FAR), ("near", NEAR_AUROC)):
            yield at_least(f"{kind}, {score}: AUROC", least, getattr(kinds.get(kind), attribute, None))


def _leads(part: str, results: SegmentationResults) -> Iterator[Target]:
    for kind, rows in results.kinds.items():
        text = f"{part}, {kind}: better than every baseline"
        if COUNTERPART not in rows:
            yield Target(text, "no result of Counterpart")
            continue
        others = {name: rows[name].lead for name in METHOD_INFO if name in rows and name != COUNTERPART}
        behind = [METHOD_INFO[name].title for name, lead in others.items() if lead is None or not lead.is_above_zero]
        missing = [info.title for name, info in METHOD_INFO.items() if name not in rows]
        found = f"{len(others) - len(behind)} of {len(others)}"
        found += f"; not than: {', '.join(behind)}" if behind else ""
        found += f"; no result: {', '.join(missing)}" if missing else ""
        yield Target(text, found, False if behind else None if missing else True)


def _t1(results: SegmentationResults | None) -> Iterator[Target]:
    row = results.kinds.get(GRADE, {}).get(COUNTERPART) if results else None
    for key, title, least in (("dice", "best Dice", T1_DICE), ("auprc", "AUPRC", T1_AUPRC)):
        found = None
        if row is not None and row.scans is not None:
            pixel_ml = Config.load(ROOT / "training" / "configs" / "t1.toml").preprocessing.voxel_ml
            pairs = zip(getattr(row.scans, key), row.scans.truth_pixels, strict=True)
            found = mean_interval([value for value, pixels in pairs if pixels * pixel_ml >= LEAST_ML])
        yield at_least(f"T1 lesions from {LEAST_ML:g} ml, {GRADE}: mean {title}", least, found)


def _tumours(measured: Measured) -> Iterator[Target]:
    """Compare the tumours with all slices (docs/evaluation), then with the slices that are compared here."""
    pooled, results = measured.tumours, measured.segmented.get("tumours")
    row = results.kinds.get("tumours", {}).get(COUNTERPART) if results else None
    pairs = {
        "all slices": [Interval(*pooled[key]) for key in ("best_pooled", "shipped_pooled")] if pooled else [None, None],
        "analysed slices": [row.dice, row.mean_shipped_dice] if row else [None, None],
    }
    for where, (best, shipped) in pairs.items():
        yield at_least(f"gliomas, {where}: best-achievable Dice", TUMOUR_DICE, best)
        text = f"gliomas, {where}: shipped Dice within {SHIPPED_WITHIN} of it"
        if best is None or shipped is None:
            yield Target(text, "no result")
        else:
            gap = best.value - shipped.value
            yield Target(text, f"{shipped.value:.3f}, {gap:.3f} below", gap <= SHIPPED_WITHIN)


def _times(part: str, results: SegmentationResults | None) -> Iterator[Target]:
    runs = results.methods if results else {}
    for name in (TRANSFORMER, ENSEMBLE):
        text = f"{part}, {METHOD_INFO[name].title}: {TIMES:.0f} times Counterpart's time"
        if name not in runs or COUNTERPART not in runs:
            yield Target(text, "no result")
            continue
        theirs, own = runs[name].seconds_per_slice, runs[COUNTERPART].seconds_per_slice
        found = f"{theirs / own:.1f} times ({theirs * 1e3:.0f}, {own * 1e3:.0f} ms)"
        yield Target(text, found, theirs / own >= TIMES)
