"""Aims of the project and what was measured: the first table of the page."""

import operator
from dataclasses import dataclass

import numpy as np

from training.cluster_bootstrap import Interval
from training.experiments.markdown import table
from training.formats import show_interval, show_share
from training.results_page.formats import NO_VALUE, number_of
from training.results_page.groups import (
    ANALYSED,
    HIGH,
    Haemorrhage,
    Healthy,
    compared_lesions,
    haemorrhage_groups,
    home_groups,
    inserted_dice,
    real_t1_outcomes,
    together,
    unseen_groups,
    warm_seconds,
)
from training.results_page.records import Records
from training.site_profile_page import held_out_heads

HOME_ML = 0.7
BRIGHT_DICE, DARK_DICE = 0.56, 0.55
UNSEEN_ML, UNSEEN_HIGH_ML, UNSEEN_ANALYSED, UNSEEN_RATIO = 1.0, 3.0, 0.98, 0.9
# Target of the site profile, and limits of the false findings in heads that the profile was not made from.
PROFILE_TARGET_ML, PROFILE_ML, PROFILE_HIGH_ML = 0.5, 0.5, 1.0
SLICE_AUROC, PATIENT_AUROC, HAEMORRHAGE_DICE = 0.90, 0.95, 0.40
# Median volume in adults without haemorrhage.
UNAFFECTED_ML = 2.0
# Titles and largest seconds of the parts of the benchmarks.
UPLOADS = {
    "volume": ("T1 volume, from upload to mask", 15.0),
    "ct": ("head CT of 512 x 512 x 200 voxels, from upload to mask", 20.0),
}
COMPARISONS = {"=": operator.eq, "≤": operator.le, "≥": operator.ge, "<": operator.lt, ">": operator.gt}


@dataclass(frozen=True)
class Limit:
    """Limit of a measurement, with its sign and its unit."""

    sign: str
    value: float
    unit: str = ""

    def __str__(self) -> str:
        """Return the limit as the table shows it."""
        number = f"{100 * self.value:g}" if self.unit == "%" else f"{self.value:g}"
        return f"{self.sign} {number} {self.unit}".strip()


@dataclass(frozen=True)
class Aim:
    """Aim, and what was measured. `value` is NaN if there is no measurement."""

    text: str
    limit: Limit
    label: str = ""
    value: float = np.nan
    shown: str = ""
    count: str = ""

    def cells(self) -> list[str]:
        """Return the line of the table."""
        if not np.isfinite(self.value):
            return [self.text, "", NO_VALUE, "", str(self.limit), ""]
        is_met = COMPARISONS[self.limit.sign](self.value, self.limit.value)
        return [self.text, self.label, self.shown, self.count, str(self.limit), "yes" if is_met else "**no**"]


def make_aims(records: Records) -> str:
    """Make the table of the aims."""
    aims = [
        *_home(records),
        *_unseen(records),
        *_profiles(records),
        _real_lesions(records),
        *_haemorrhage(records),
        *_time(records),
    ]
    header = ["aim", "model", "measured", "n", "limit", "reached"]
    return table(header, [aim.cells() for aim in aims])


def _volume(text: str, group: Healthy, percent: float, limit: float) -> Aim:
    found = group.percentile(percent)
    return Aim(text, Limit("≤", limit, "ml"), group.label, found.value, f"{show_interval(found)} ml", number_of(group))


def _home(records: Records) -> list[Aim]:
    groups = [group for group in home_groups(records) if group.model == "t1"]
    aims = [_volume(f"home, {group.source}: false findings, median", group, 50, HOME_ML) for group in groups]
    part = records.evaluation.get(("t1", "lesions"))
    for name, bright, least in (("bright", True, BRIGHT_DICE), ("dark", False, DARK_DICE)):
        text, limit = f"home: Dice of inserted {name} lesions, median", Limit(">", least)
        if part is None:
            aims.append(Aim(text, limit))
            continue
        found = inserted_dice(part.rows, bright=bright)
        people = len({row["subject"] for row in part.rows})
        aims.append(Aim(text, limit, part.label, found.value, show_interval(found), f"{people}"))
    return aims


def _unseen(records: Records) -> list[Aim]:
    if not (groups := unseen_groups(records)):
        return []
    whole, count = together(groups), len(together(groups).ml)
    analysed = Aim(
        "other scanners: healthy scans that are analysed", Limit("≥", UNSEEN_ANALYSED, "%"),
        whole.label, count / whole.scans, show_share(count, whole.scans), number_of(whole),
    )  # fmt: skip
    volumes = [
        _volume("other scanners: false findings, median", whole, 50, UNSEEN_ML),
        _volume(f"other scanners: false findings, {HIGH:.0f}th percentile", whole, HIGH, UNSEEN_HIGH_ML),
    ]
    limit = Limit("≥", UNSEEN_RATIO)
    ratios = [
        Aim(
            f"other scanners: {title}, divided by home",
            limit,
            whole.label,
            compared.ratio.value,
            show_interval(compared.ratio),
            number_of(whole),
        )
        for title, compared in compared_lesions(records)
        if compared.ratio
    ]
    missing = Aim("other scanners: Dice of inserted lesions, divided by home", limit)
    return [analysed, *volumes, *(ratios or [missing])]


def _profiles(records: Records) -> list[Aim]:
    """Return the aims for a scanner with a site profile."""
    if (part := records.evaluation.get(("t1", "heads"))) is None:
        return []
    reached = [h for h in held_out_heads(part.rows) if h.target_ml == PROFILE_TARGET_ML and len(h.volumes_ml)]
    limits = (("median", 50.0, PROFILE_ML), (f"{HIGH:.0f}th percentile", HIGH, PROFILE_HIGH_ML))
    return [
        Aim(
            f"with a site profile, {heads.kind}: false findings, {name}",
            Limit("≤", most, "ml"),
            part.label,
            (found := heads.percentile(percent)).value,
            f"{show_interval(found)} ml",
            str(len(heads.volumes_ml)),
        )
        for heads in reached
        for name, percent, most in limits
    ]


def _real_lesions(records: Records) -> Aim:
    text, limit = "real lesions in T1: scans that are analysed", Limit("=", 1, "%")
    outcomes = real_t1_outcomes(records)
    if not outcomes:
        return Aim(text, limit)
    label, count = records.evaluation["t1", "pathology"].label, outcomes.count(ANALYSED)
    return Aim(text, limit, label, count / len(outcomes), show_share(count, len(outcomes)), str(len(outcomes)))


def _haemorrhage(records: Records) -> list[Aim]:
    return [aim for group in haemorrhage_groups(records) if group.model == "ct" for aim in _of_ct(group)]


def _of_ct(group: Haemorrhage) -> list[Aim]:
    people = f"{len(group.affected) + len(group.unaffected)}"
    aims = []
    for name, least in (("slice", SLICE_AUROC), ("patient", PATIENT_AUROC)):
        for key, which in (("volume", ""), ("brighter", ", only brighter findings")):
            found = Interval(*group.summary[f"{name}_auroc_{key}"])
            text = f"haemorrhage: AUROC by {name}{which}"
            aims.append(Aim(text, Limit("≥", least), group.label, found.value, show_interval(found), people))
    overlap = float(np.mean(group.outlined_dice or [np.nan]))
    text, count = "haemorrhage: Dice in outlined slices, mean of patients", str(len(group.outlined_dice))
    aims.append(Aim(text, Limit("≥", HAEMORRHAGE_DICE), group.label, overlap, f"{overlap:.2f}", count))
    median = float(np.median(group.unaffected or [np.nan]))
    text, count = "no haemorrhage: false findings, median", str(len(group.unaffected))
    return [*aims, Aim(text, Limit("≤", UNAFFECTED_ML, "ml"), group.label, median, f"{median:.2f} ml", count)]


def _time(records: Records) -> list[Aim]:
    aims = []
    for part, (text, most) in UPLOADS.items():
        if seconds := warm_seconds(records, part):
            label = records.bundles.label_id(records.benchmarks[part]["runs"][0]["id"])
            median = float(np.median(seconds))
            aims.append(Aim(text, Limit("<", most, "s"), label, median, f"{median:.1f} s", "1"))
    return aims
