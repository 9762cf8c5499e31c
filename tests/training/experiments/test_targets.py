"""Verdicts of the targets."""

import pytest

from tests.training.experiments.test_results_cache import NOW
from training.experiments.methods import COUNTERPART, METHOD_INFO
from training.experiments.metrics import Interval
from training.experiments.results import Gain, MethodScores, ScanScores, SegmentationResults
from training.experiments.targets import Measured, Target, at_least, compare_targets

pytestmark = pytest.mark.training


def interval(value: float) -> Interval:
    return Interval(value, value - 0.05, value + 0.05)


def scores(auprc_lead: float | None = None, dice_lead: float = 0.2, scans: ScanScores | None = None) -> MethodScores:
    lead = None if auprc_lead is None else Gain(auprc=interval(auprc_lead), dice=interval(dice_lead))
    number = interval(0.74)
    return MethodScores(
        auprc=number,
        dice=number,
        cases=3,
        mean_scan_auprc=number,
        mean_scan_dice=number,
        mean_shipped_dice=interval(0.65),
        lead=lead,
        scans=scans,
    )


def found(part: str, kinds: dict[str, dict[str, MethodScores]], begins: str) -> Target:
    results = SegmentationResults(provenance=NOW, kinds=kinds, methods={})
    every = compare_targets(Measured(None, {part: results}, None))
    (target,) = [target for target in every if target.text.startswith(begins)]
    return target


def test_nothing_is_met_without_results() -> None:
    assert {target.met for target in compare_targets(Measured(None, {}, None))} == {None}


@pytest.mark.parametrize(("value", "met"), [(0.99, True), (0.9899, False), (float("nan"), None)])
def test_number_is_compared_unrounded(value: float, *, met: bool | None) -> None:
    assert at_least("AUROC", 0.99, interval(value)).met is met


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({}, True),
        ({"vae": scores(0.2, 0.04)}, False),
        ({"vae": None}, None),
        ({"vae": None, "mean": scores(0.0)}, False),
    ],
)
def test_lead_over_every_baseline_counts_in_both(changes: dict[str, MethodScores | None], *, met: bool | None) -> None:
    rows = {name: scores(0.2) for name in METHOD_INFO if name != COUNTERPART} | changes
    kinds = {"MS": {COUNTERPART: scores()} | {name: row for name, row in rows.items() if row is not None}}
    assert found("stripped", kinds, "stripped, MS:").met is met


def test_t1_target_takes_large_lesions_only() -> None:
    # Two scans of 2 ml and more and one of 1 ml, at 0.008 ml per pixel.
    scans = ScanScores(auprc=(0.4, 0.6, 1.0), dice=(0.70, 0.72, 0.1), truth_pixels=(250.0, 999.0, 125.0))
    kinds = {"grade 2": {COUNTERPART: scores(scans=scans)}}
    begins = "T1 lesions from 2 ml, grade 2: mean"
    dice, auprc = (found("shapes", kinds, f"{begins} {key}") for key in ("best Dice", "AUPRC"))
    assert (dice.met, auprc.met) == (True, False)
    assert dice.found.startswith("0.7100")


def test_shipped_dice_is_compared_with_the_best() -> None:
    kinds = {"tumours": {COUNTERPART: scores()}}
    assert found("tumours", kinds, "gliomas, analysed slices: shipped").met is False
    pooled = {"best_pooled": [0.64, 0.5, 0.7], "shipped_pooled": [0.6, 0.5, 0.7]}
    every = {target.text: target.met for target in compare_targets(Measured(None, {}, pooled))}
    assert every["gliomas, all slices: best-achievable Dice >= 0.65"] is False
    assert every["gliomas, all slices: shipped Dice within 0.08 of it"] is True
