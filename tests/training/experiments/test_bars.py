"""Each bar says what the kept numbers say: met, missed, or not measured and why."""

from typing import Any

import pytest

from training.experiments.bars import Bar, bars, bars_section
from training.experiments.report import NAMES

pytestmark = pytest.mark.training

FEW = {"counterpart": "**Counterpart**", "vae": "variational autoencoder", "mean": "mean slice"}


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def row(auprc_gap: float, dice_gap: float) -> dict[str, Any]:
    return {"cases": 3, "behind": {"auprc": interval(auprc_gap), "dice": interval(dice_gap)}}


def found(known: dict[str, Any], begins: str, **kept: Any) -> Bar:
    """The one bar whose text begins so."""
    (bar,) = [b for b in bars(known, kept.get("evaluated", {}), kept.get("names", FEW)) if b.text.startswith(begins)]
    return bar


def test_nothing_measured_is_told_of_every_bar() -> None:
    documents: list[dict[str, Any]] = [{}, {"shapes": {}}, {"tumours": {"kinds": {"tumours": {}}, "methods": {}}}]
    for known in documents:
        told = bars(known, {"flair": {"healthy": {"rows": []}}}, NAMES)
        assert {bar.verdict for bar in told} == {"not measured"}
    assert found({}, "far-OOD, CXR: AUROC of the score chosen").found == "imagewise did not run"


def test_both_scores_are_measured_class_by_class_by_unrounded_value() -> None:
    kinds = {kind: {"auroc": interval(v)} for kind, v in {"near": 0.9, "CXR": 0.99, "Hand": 0.9899}.items()}
    kinds["ChestCT"] = {"auroc": interval(float("nan"))}
    kinds["Hand"]["named"] = interval(0.995)
    known = {"imagewise": {"methods": {"counterpart": {"kinds": kinds}}}}

    def bar(kind: str, score: str = "the score chosen") -> Bar:
        return found(known, f"far-OOD, {kind}: AUROC of {score}")

    verdicts = {kind: bar(kind).verdict for kind in ("CXR", "Hand", "ChestCT", "BreastMRI")}
    assert verdicts == {"CXR": "met", "Hand": "**missed**", "ChestCT": "not measured", "BreastMRI": "not measured"}
    assert bar("CXR").found == "0.9900 (0.940 to 1.040)"
    assert bar("BreastMRI").found == "no BreastMRI in imagewise"
    assert bar("Hand", "the mean KL over the head").met
    assert bar("CXR", "the mean KL over the head").found == "no named in imagewise"
    assert found(known, "near-OOD: AUROC of the score chosen").met


@pytest.mark.parametrize(
    ("rows", "told", "met"),
    [
        ({"vae": row(0.2, 0.2), "mean": row(0.3, 0.1)}, "above 2 of 2 that ran, 3 scans", True),
        (
            {"vae": row(0.2, 0.04), "mean": row(0.3, 0.1)},
            "above 1 of 2 that ran, 3 scans; not above: variational autoencoder",
            False,
        ),
        ({"mean": row(0.3, 0.1)}, "above 1 of 1 that ran, 3 scans; did not run: variational autoencoder", None),
        (
            {"mean": row(0.0, 0.1)},
            "above 0 of 1 that ran, 3 scans; not above: mean slice; did not run: variational autoencoder",
            False,
        ),
    ],
)
def test_every_opponent_counts_in_both(rows: dict[str, Any], told: str, *, met: bool | None) -> None:
    known = {"stripped": {"kinds": {"MS": {"counterpart": {"cases": 3}, **rows}}}}
    bar = found(known, "stripped, MS:")
    assert (bar.found, bar.met) == (told, met)


def test_without_counterpart_nobody_is_behind() -> None:
    bar = found({"sprites": {"kinds": {"grade 1": {"vae": {"cases": 3}}}}}, "sprites, grade 1:")
    assert (bar.found, bar.met) == ("Counterpart did not run", None)


def test_aspirations_are_of_each_scan_and_of_pooled_tumours() -> None:
    # Two scans of 2 ml and more, and one of 1 ml, at 0.008 ml a pixel.
    scans = {"dice": [0.70, 0.72, 0.1], "auprc": [0.4, 0.6, 1.0], "truth_pixels": [250.0, 999.0, 125.0]}
    known = {
        "shapes": {"kinds": {"grade 2": {"counterpart": {"scans": scans}}}},
        "tumours": {"kinds": {"tumours": {"counterpart": {"dice": interval(0.74), "scan_shipped": interval(0.65)}}}},
    }
    synthetic = "aspiration: synthetic T1 lesions of 2 ml and more, grade 2: mean of each scan's"
    assert found(known, f"{synthetic} best Dice at least 0.70").found.startswith("0.7100 (")
    assert found(known, f"{synthetic} best Dice at least 0.70").met is True
    assert found(known, f"{synthetic} AUPRC at least 0.75").found.startswith("0.5000 (")
    assert found(known, f"{synthetic} AUPRC at least 0.75").met is False
    assert found({}, f"{synthetic} AUPRC").found == "shapes did not run"
    pooled = {"method": "counterpart", "best_pooled": [0.64, 0.5, 0.7], "shipped_pooled": [0.6, 0.5, 0.7]}
    evaluated = {"flair": {"tumours": {"rows": [{"subject": "a", "dice": 0.9}, pooled]}}}
    whole, table = "aspiration: TCGA-LGG, whole scans (docs/evaluation)", "aspiration: TCGA-LGG, table 3a"
    assert found(known, f"{whole}: best", evaluated=evaluated).verdict == "**missed**"
    shipped = found(known, f"{whole}: shipped", evaluated=evaluated)
    assert (shipped.found, shipped.met) == ("0.6000 (0.500 to 0.700), 0.040 below", True)
    assert found(known, f"{whole}: shipped").met is None
    assert found(known, f"{table}: best").met is True
    shipped = found(known, f"{table}: shipped")
    assert (shipped.found, shipped.met) == ("0.6500 (0.600 to 0.700), 0.090 below", False)


def test_the_transformers_time_is_a_multiple_of_ours_in_the_same_table() -> None:
    seconds = {"counterpart": 0.1, "transformer": 4.9, "transformer-ensemble": 39.2}
    methods = {name: {"seconds_per_slice": value} for name, value in seconds.items()}
    known = {"sprites": {"methods": methods}, "shapes": {"methods": {"transformer": methods["transformer"]}}}
    alone = found(known, "sprites, transformer:")
    assert (alone.found, alone.met) == ("49.0 times: 4900 ms against 100 ms", False)
    assert found(known, "sprites, transformer-ensemble:").met is True
    assert found(known, "shapes, transformer:").found == "no counterpart in shapes"
    assert found(known, "tumours, transformer:").found == "tumours did not run"


def test_the_table_counts_its_verdicts() -> None:
    kinds = {"near": {"auroc": interval(0.95)}, "Hand": {"auroc": interval(0.5)}}
    known = {"imagewise": {"methods": {"counterpart": {"kinds": kinds}}}}
    page = "\n".join(bars_section(known, {}, FEW))
    count = len(bars(known, {}, FEW))
    assert f"Of {count} bars 1 are met, 1 are missed and {count - 2} are not measured." in page
    assert "| near-OOD: AUROC of the score chosen on validation at least 0.90 | 0.9500 (0.900 to 1.000) | met |" in page
    assert "| 0.5000 (0.450 to 0.550) | **missed** |" in page
