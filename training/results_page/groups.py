"""Measurements in groups: each group is a row of a table and of a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from training.cluster_bootstrap import (
    MIN_CLUSTERS,
    Interval,
    Statistic,
    cluster_weights,
    crossed_weights,
    interval,
    mean,
    quantile,
)
from training.lesion_comparison import Cases, Compared, both_groups, families
from training.results_page.records import Part, Records, Rows

# Sources of the healthy test scans. Each is also a source of the training scans.
HOME_SOURCES = {
    "t1": "ds002748 (one scanner)",
    "flair": "TCGA-LGG (several hospitals)",
    "headct": "MedNIST (scanners not known)",
    "ct": "ct-ich (one hospital)",
}
IXI_SOURCE = "IXI"
# Titles of the kinds of lesions in the records.
LESIONS = {
    "BRATS 2013, T1 with contrast agent: tumour with oedema": "tumour with oedema, T1 with contrast agent (BRATS)",
    "BRATS 2013, T1 with contrast agent: tumour without oedema": "the same tumours without oedema",
    "stroke inserted dark: stroke": "stroke outline, inserted dark, T1",
    "multiple sclerosis, T1: lesions": "multiple sclerosis, T1",
    "MS lesions, FLAIR": "multiple sclerosis, FLAIR without skull",
    "BRATS 2013, FLAIR": "tumour with oedema, FLAIR without skull (BRATS)",
}
GLIOMAS = "glioma, FLAIR (TCGA-LGG)"
NO_HEALTHY_SLICE = "no_healthy_slice"
ANALYSED = "analysed"
# Percentile that describes the scans with many false findings.
HIGH = 90.0


@dataclass(frozen=True)
class Healthy:
    """Healthy scans of one source.

    Attributes
    ----------
    source, model, label : str
        Scanner or data set, model, and label of the bundle.
    people : tuple of str
        Person of each analysed scan.
    ml : tuple of float
        Volume of the false findings in each analysed scan.
    refused : int
    """

    source: str
    model: str
    label: str
    people: tuple[str, ...]
    ml: tuple[float, ...]
    refused: int

    @property
    def scans(self) -> int:
        """Number of analysed and refused scans."""
        return len(self.ml) + self.refused

    def percentile(self, percent: float) -> Interval:
        """Return a percentile of the volume. It has no interval if there are few people, and no value without scans."""
        return resampled(quantile(self.ml, percent), self.people) if self.ml else Interval(*[np.nan] * 3)


def resampled(statistic: Statistic, people: Sequence[str], strata: Sequence[str] | None = None) -> Interval:
    """Return a statistic with its interval over people, which is NaN if there are few people."""
    if len(set(people)) < MIN_CLUSTERS:
        return Interval(float(statistic(np.ones((1, len(people)), np.int64))[0]), np.nan, np.nan)
    return interval(statistic, cluster_weights(people, strata, seed=0))


def home_groups(records: Records) -> list[Healthy]:
    """Return the healthy test scans of the sources that the training saw."""
    groups = []
    for part in records.find("healthy"):
        rows = [row for row in part.rows if row["outcome"] != NO_HEALTHY_SLICE]
        groups.append(_healthy(HOME_SOURCES[part.model], part, rows, "subject", "false_positive_ml"))
        if (heads := records.evaluation.get((part.model, "heads"))) and (known := _heads(heads, in_training=True)):
            groups.append(_healthy(IXI_SOURCE, heads, known, "person", "found_ml"))
    return groups


def unseen_groups(records: Records) -> list[Healthy]:
    """Return the healthy heads of each scanner that no training saw, one scan of each person."""
    groups = []
    for part in records.find("heads"):
        rows = sorted(_heads(part, in_training=False), key=lambda row: str(row["kind"]))
        groups += [
            _healthy(kind, part, list(of_kind), "person", "found_ml")
            for kind, of_kind in groupby(rows, key=lambda row: str(row["kind"]))
        ]
    return sorted(groups, key=lambda group: -group.scans)


def together(groups: Sequence[Healthy]) -> Healthy:
    """Return the scans of several groups of one model as one group."""
    first = groups[0]
    people = tuple(person for group in groups for person in group.people)
    ml = tuple(ml for group in groups for ml in group.ml)
    return Healthy("all of them", first.model, first.label, people, ml, sum(group.refused for group in groups))


def _heads(part: Part, *, in_training: bool) -> Rows:
    return [row for row in part.rows if row["in_training"] == in_training and row["counted"]]


def _healthy(source: str, part: Part, rows: Rows, person: str, ml: str) -> Healthy:
    done = [row for row in rows if row["outcome"] == ANALYSED]
    values = tuple(float(row[ml]) for row in done)
    return Healthy(source, part.model, part.label, tuple(row[person] for row in done), values, len(rows) - len(done))


# ---- inserted lesions --------------------------------------------------------------------------


def inserted_dice(rows: Rows, *, bright: bool) -> Interval:
    """Return the median Dice of the bright or of the dark inserted lesions, with an interval over people and shapes."""
    return _median_dice([row for row in rows if (row["contrast"] > 0) == bright])


def _median_dice(rows: Rows) -> Interval:
    weights = crossed_weights([row["subject"] for row in rows], [row["shape"] for row in rows])
    return interval(quantile([row["dice"] for row in rows]), weights)


def compared_lesions(records: Records) -> list[tuple[str, Compared]]:
    """Compare the inserted lesions of `t1` on scanners that no training saw with those at home, by title.

    The list is empty if one bundle did not measure both.
    """
    unseen, home = (records.evaluation.get(("t1", name)) for name in ("unseen_lesions", "lesions"))
    if unseen is None or home is None or unseen.digest != home.digest:
        return []
    rows = dict(families(both_groups(unseen.rows, home.rows)))
    lesions, patches = rows["both signs"], rows.get("foreign patches", [])
    found = [
        ("Dice, bright and dark lesions", Cases.of(lesions, "dice").compare(quantile)),
        ("Dice, tissue from another place", Cases.of(patches, "dice").compare(quantile)),
        ("share of the lesions that is found", Cases.of_lesions(lesions).compare(mean)),
    ]
    return [(title, compared) for title, compared in found if compared.ratio]


# ---- real lesions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outlined:
    """Scans with outlined lesions of one kind.

    Attributes
    ----------
    title, model, label : str
    dice : tuple of float
        Dice of each analysed scan at the shipped threshold.
    refused : int
        Number of the scans that were refused.
    found : tuple of bool, or None
        Whether each connected lesion is found, also in refused scans. None if it was not measured.
    """

    title: str
    model: str
    label: str
    dice: tuple[float, ...]
    refused: int
    found: tuple[bool, ...] | None

    @property
    def scans(self) -> int:
        """Number of analysed and refused scans."""
        return len(self.dice) + self.refused


def outlined_groups(records: Records) -> list[Outlined]:
    """Return the scans with real lesions, and with strokes that were inserted, by kind and outline."""
    groups = []
    for part in records.find("pathology"):
        for kind, outline in dict.fromkeys((row["kind"], row["outline"]) for row in part.rows):
            rows = [row for row in part.rows if (row["kind"], row["outline"]) == (kind, outline)]
            groups.append(_outlined(f"{kind}: {outline}", part, rows))
    gliomas = [
        _outlined(GLIOMAS, part, [row for row in part.rows if "subject" in row]) for part in records.find("tumours")
    ]
    stripped = [
        _outlined(kind, part, [{**row, "outcome": ANALYSED} for row in part.rows])
        for kind, part in records.stripped.items()
    ]
    return [*groups, *gliomas, *stripped]


def _outlined(title: str, part: Part, rows: Rows) -> Outlined:
    done = [row for row in rows if row["outcome"] == ANALYSED]
    found = (
        tuple(bool(hit) for row in rows for _, hit in row["lesions"]) if all("lesions" in row for row in rows) else None
    )
    dice = tuple(float(row["dice"]) for row in done)
    return Outlined(LESIONS.get(title, title), part.model, part.label, dice, len(rows) - len(done), found)


def real_t1_outcomes(records: Records) -> list[str]:
    """Return the outcome of each T1 scan with real lesions."""
    part = records.evaluation.get(("t1", "pathology"))
    rows = part.rows if part else []
    return list({row["name"]: row["outcome"] for row in rows if "inserted" not in row["kind"]}.values())


# ---- haemorrhage -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Haemorrhage:
    """Adults of ct-ich, measured with one model.

    Attributes
    ----------
    model, label : str
    affected, unaffected : tuple of float
        Found volume in ml in each analysed adult with and without haemorrhage.
    refused_affected, refused_unaffected : int
    slice_ml, slice_bleeds : tuple
        Found volume of each slice of these adults, and whether radiologists saw haemorrhage in it.
    outlined_dice : tuple of float
        Dice on the slices with outlined haemorrhage, for each patient who has some.
    summary : dict
        AUROC with intervals, and the slices that are found by kind of haemorrhage.
    """

    model: str
    label: str
    affected: tuple[float, ...]
    unaffected: tuple[float, ...]
    refused_affected: int
    refused_unaffected: int
    slice_ml: tuple[float, ...]
    slice_bleeds: tuple[bool, ...]
    outlined_dice: tuple[float, ...]
    summary: dict[str, Any]

    def roc_curve(self) -> tuple[list[float], list[float]]:
        """Return false-positive rate and sensitivity by slice, for thresholds of the found volume from high to low."""
        ml, bleeds = np.array(self.slice_ml), np.array(self.slice_bleeds)
        levels = np.unique(ml)[::-1]
        rates = [(np.mean(ml[~bleeds] >= level), np.mean(ml[bleeds] >= level)) for level in levels]
        false, true = zip((0.0, 0.0), *rates, strict=True)
        return [float(rate) for rate in false], [float(rate) for rate in true]

    def slices_with_findings(self) -> tuple[float, float]:
        """Return the shares of the slices without and with haemorrhage in which anything is marked."""
        marked, bleeds = np.array(self.slice_ml) > 0, np.array(self.slice_bleeds)
        return float(np.mean(marked[~bleeds])), float(np.mean(marked[bleeds]))


def haemorrhage_groups(records: Records) -> list[Haemorrhage]:
    """Return the adults of ct-ich for each model that was measured on them."""
    groups = []
    for part in reversed(records.find("haemorrhage")):
        adults = [row for row in part.rows if row.get("adult")]
        done = {
            flag: [r for r in adults if r["haemorrhage"] is flag and r["outcome"] == ANALYSED] for flag in (True, False)
        }
        refused = {flag: sum(r["haemorrhage"] is flag for r in adults) - len(done[flag]) for flag in done}
        slices = [s for r in (*done[True], *done[False]) for s in r["slices"]]
        groups.append(
            Haemorrhage(
                part.model,
                part.label,
                tuple(r["found_ml"] for r in done[True]),
                tuple(r["found_ml"] for r in done[False]),
                refused[True],
                refused[False],
                tuple(s["found_ml"] for s in slices),
                tuple(bool(s["bleeds"]) for s in slices),
                tuple(r["dice"] for r in done[True] if "dice" in r),
                next(row["summary"] for row in part.rows if "summary" in row),
            )
        )
    return groups


# ---- time --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """Seconds of one phase of an analysis, in the networks and outside them."""

    name: str
    network: float
    other: float


def phases(records: Records) -> list[Phase]:
    """Return the phases of the T1 scan of the benchmarks in their order."""
    found = records.benchmarks.get("waterfall", {}).get("after", {}).get("phases", {})
    return [Phase(name, phase["network"], phase["seconds"] - phase["network"]) for name, phase in found.items()]


def warm_seconds(records: Records, part: str) -> list[float]:
    """Return the seconds from upload to mask of a part of the benchmarks, without the first scan after the start."""
    return [run["seconds"] for run in records.benchmarks.get(part, {}).get("runs", [])[1:]]
