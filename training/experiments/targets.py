"""What good means here: bars that were set beforehand, and what the kept numbers say of each."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from training.config import ROOT, Config
from training.experiments.methods import OURS
from training.experiments.metrics import mean_interval

CONFIGS = ROOT / "training" / "configs"
# AUROC of pictures of other parts of the body, and of sprites in heads.
FAR = ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand")
FAR_AUROC, NEAR_AUROC = 0.99, 0.90
# The bars do not say of which score: both are judged.
SCORES = {"the score chosen on validation": "auroc", "the mean KL over the head, METHOD's own": "named"}
# Where Counterpart is compared with every opponent.
COMPARED = ("sprites", "shapes", "tumours", "ms-t1", "stripped")
# Of each scan of shapes that is large enough, and the grade of the aspirations.
GRADE, T1_DICE, T1_AUPRC, LEAST_ML = "grade 2", 0.70, 0.75, 2.0
TUMOUR_DICE, SHIPPED_WITHIN = 0.65, 0.08
TIMED = ("sprites", "shapes", "tumours")
TRANSFORMERS = ("transformer", "transformer-ensemble")
TIMES = 50.0

INTRODUCTION = """A number meets its bar by its value, unrounded; brackets are intervals. "Above" asks for paired
intervals above zero in AUPRC and best-achievable Dice. The bars of the image-wise score stand twice, since they do not
name it: for the score that validation pictures choose, and for the one that METHOD defines. A bar over all opponents is
not measured while one has not run and none of the others misses it. Each number belongs to the bundle and the code of
its own table, below or in `docs/evaluation`."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes
    ----------
    text : str
        What is asked.
    found : str
        What was measured, or why nothing was.
    met : bool or None
        None where it was not measured.
    """

    text: str
    found: str
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return "not measured" if self.met is None else "met" if self.met else "**missed**"


@dataclass(frozen=True)
class Spread:
    """A number and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.3f} to {self.high:.3f})"


def at(document: Any, *keys: str) -> Any:
    """What lies below these keys; None where one is missing."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def spread(kept: Any) -> Spread | None:
    """An interval as the experiments or the evaluation keep it; None where it is missing or no number."""
    match kept:
        case {"value": value, "low": low, "high": high} | [value, low, high]:
            numbers = (value, low, high)
            return Spread(*numbers) if all(isinstance(n, int | float) and math.isfinite(n) for n in numbers) else None
    return None


def why_not(known: Row, part: str, *keys: str) -> str:
    """What of a part's numbers is missing first."""
    for i, key in enumerate(keys):
        if at(known, part, *keys[: i + 1]) is None:
            return f"no {key} in {part}" if part in known else f"{part} did not run"
    return f"no such number in {part}"


def least(text: str, least_of: float, known: Row, part: str, *keys: str) -> Bar:
    """A bar that a kept number must reach."""
    return reached(text, least_of, spread(at(known, part, *keys)), why_not(known, part, *keys))


def reached(text: str, least_of: float, found: Spread | None, otherwise: str) -> Bar:
    """A bar that a number must reach, or why there is none."""
    text = f"{text} at least {least_of:.2f}"
    return Bar(text, otherwise) if found is None else Bar(text, str(found), found.value >= least_of)


def bars(known: Row, evaluated: Row, names: dict[str, str]) -> list[Bar]:
    """All of them.

    Parameters
    ----------
    known : dict
        Documents of docs/results by part.
    evaluated : dict
        Documents of docs/evaluation by bundle.
    names : dict of str to str
        Titles of all methods, Counterpart's too.
    """
    compared = [bar for part in COMPARED for bar in _leads(known, part, names)]
    return [*_pictures(known), *compared, *_aspirations(known), *_tumours(known, evaluated), *_times(known, names)]


def _pictures(known: Row) -> Iterator[Bar]:
    own = ("methods", OURS, "kinds")
    for score, key in SCORES.items():
        for kind in FAR:
            yield least(f"far-OOD, {kind}: AUROC of {score}", FAR_AUROC, known, "imagewise", *own, kind, key)
        yield least(f"near-OOD: AUROC of {score}", NEAR_AUROC, known, "imagewise", *own, "near", key)


def _leads(known: Row, part: str, names: dict[str, str]) -> Iterator[Bar]:
    kinds = at(known, part, "kinds")
    if not kinds:
        yield Bar(f"{part}: Counterpart above every opponent", why_not(known, part, "kinds"))
        return
    for kind, rows in kinds.items():
        yield _lead(f"{part}, {kind}: Counterpart above every opponent", rows, names)


def _title(names: dict[str, str], name: str) -> str:
    """Without a comma: titles stand in lists here."""
    return names.get(name, name).replace(",", "")


def _lead(text: str, rows: Row, names: dict[str, str]) -> Bar:
    if OURS not in rows:
        return Bar(text, "Counterpart did not run")
    above, below, absent = list[str](), list[str](), list[str]()
    for name in dict.fromkeys([*names, *rows]):
        gaps = [spread(at(rows, name, "behind", key)) for key in ("auprc", "dice")]
        if name != OURS:
            ahead = all(gap is not None and gap.low > 0 for gap in gaps)
            (absent if None in gaps else above if ahead else below).append(_title(names, name))
    told = [f"above {len(above)} of {len(above) + len(below)} that ran, {rows[OURS].get('cases', '?')} scans"]
    told += [f"not above: {', '.join(below)}"] if below else []
    told += [f"did not run: {', '.join(absent)}"] if absent else []
    return Bar(text, "; ".join(told), False if below else None if absent or not above else True)


def _aspirations(known: Row) -> Iterator[Bar]:
    for key, title, aim in (("dice", "best Dice", T1_DICE), ("auprc", "AUPRC", T1_AUPRC)):
        text = f"aspiration: synthetic T1 lesions of {LEAST_ML:g} ml and more, {GRADE}: mean of each scan's {title}"
        where = ("kinds", GRADE, OURS, "scans")
        yield reached(text, aim, _mean_of_large(at(known, "shapes", *where), key), why_not(known, "shapes", *where))


def _mean_of_large(scans: dict[str, list[float]] | None, key: str) -> Spread | None:
    """Mean over the scans of `t1` that have so much of a lesion."""
    if not scans:
        return None
    pixel_ml = Config.load(CONFIGS / "t1.toml").preparation.voxel_ml
    pairs = zip(scans[key], scans["truth_pixels"], strict=True)
    return spread(asdict(mean_interval([value for value, pixels in pairs if pixels * pixel_ml >= LEAST_ML])))


def _tumours(known: Row, evaluated: Row) -> Iterator[Bar]:
    """Once of all slices, as the evaluation has them, and once of the slices that are compared here."""
    rows = at(evaluated, "flair", "tumours", "rows") or []
    own: Row = next((r for r in rows if r.get("method") == OURS), {})
    pooled = {"flair's evaluation": own} if own else {}
    everywhere = "aspiration: TCGA-LGG, whole scans (docs/evaluation)"
    yield least(f"{everywhere}: best-achievable Dice", TUMOUR_DICE, pooled, "flair's evaluation", "best_pooled")
    text = f"{everywhere}: shipped Dice, pooled, within {SHIPPED_WITHIN} of it"
    yield _within(text, spread(own.get("best_pooled")), spread(own.get("shipped_pooled")))
    keys, here = ("kinds", "tumours", OURS), "aspiration: TCGA-LGG, table 3a"
    yield least(f"{here}: best-achievable Dice", TUMOUR_DICE, known, "tumours", *keys, "dice")
    text = f"{here}: shipped Dice, mean of the scans, within {SHIPPED_WITHIN} of it"
    found = [spread(at(known, "tumours", *keys, key)) for key in ("dice", "scan_shipped")]
    yield _within(text, *found)


def _within(text: str, best: Spread | None, shipped: Spread | None) -> Bar:
    if best is None or shipped is None:
        return Bar(text, "one of the two is not there")
    gap = best.value - shipped.value
    return Bar(text, f"{shipped}, {abs(gap):.3f} {'below' if gap >= 0 else 'above'}", gap <= SHIPPED_WITHIN)


def _times(known: Row, names: dict[str, str]) -> Iterator[Bar]:
    for part in TIMED:
        for name in TRANSFORMERS:
            text = f"{part}, {_title(names, name)}: at least {TIMES:.0f} times Counterpart's milliseconds a slice"
            theirs, own = (at(known, part, "methods", n, "seconds_per_slice") for n in (name, OURS))
            if not theirs or not own:
                yield Bar(text, why_not(known, part, "methods", OURS if theirs else name, "seconds_per_slice"))
                continue
            found = f"{theirs / own:.1f} times: {theirs * 1e3:.0f} ms against {own * 1e3:.0f} ms"
            yield Bar(text, found, theirs / own >= TIMES)


def bars_section(known: Row, evaluated: Row, names: dict[str, str]) -> list[str]:
    """As a table; parameters as of `bars`."""
    told = bars(known, evaluated, names)
    met, missed = (sum(bar.met is verdict for bar in told) for verdict in (True, False))
    count = f"Of {len(told)} bars {met} are met, {missed} are missed and {len(told) - met - missed} are not measured."
    lines = ["## Bars that were set beforehand", "", f"{count}\n{INTRODUCTION}", ""]
    lines += ["| bar | measured | |", "| --- | --- | --- |"]
    return [*lines, *(f"| {bar.text} | {bar.found} | {bar.verdict} |" for bar in told), ""]
