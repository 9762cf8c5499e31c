"""int8 is rightly kept by a rule, from the numbers of the run."""

from typing import Any

from benchmarks.verdict import RULE, int8_verdict


def found(seconds: list[float], dice: list[float], auprc: list[float], refused: int = 0) -> dict[str, Any]:
    repeats = [{"seconds": s} for s in seconds]
    return {"repeats": repeats, "accuracy": {"dice": dice, "auprc": auprc, "refused": refused}}


def document(mine: dict[str, Any]) -> dict[str, Any]:
    return {"rows": {"service": mine, "service-float32": found([4.0, 5.0, 4.0], [0.5, 0.7], [0.4, 0.6])}}


def test_faster_and_as_good_is_kept() -> None:
    # 3 / 4, 2.5 / 5, 3 / 4: the median is on the limit; Dice falls by 0.005 and AUPRC rises.
    told = int8_verdict(document(found([3.0, 2.5, 3.0], [0.5, 0.69], [0.5, 0.6])))
    assert told == (
        f"{RULE} Here: 75% of the time in float32, best Dice 0.595 against 0.600, AUPRC 0.550 against 0.500; "
        "int8 is **rightly kept**."
    )
    assert "at most 75% of the time in float32" in RULE
    assert "by more than 0.01." in RULE


def test_each_limit_is_one() -> None:
    slow = int8_verdict(document(found([3.1, 3.9, 3.1], [0.5, 0.7], [0.4, 0.6])))
    assert "78% of the time in float32" in slow
    assert slow.endswith("int8 is **wrongly kept** (time).")
    worse = int8_verdict(document(found([1.0, 1.0, 1.0], [0.5, 0.67], [0.4, 0.57])))
    assert worse.endswith("int8 is **wrongly kept** (best Dice and AUPRC).")


def test_refusals_are_told_apart() -> None:
    told = int8_verdict(document(found([2.0, 2.5, 2.0], [0.5, 0.0], [0.4, 0.0], refused=1)))
    assert "AUPRC 0.200 against 0.500, 1 of 2 cases refused in int8 and counted as empty; " in told
    assert told.endswith("int8 is **wrongly kept** (best Dice and AUPRC).")
    rows = document(found([2.0, 2.5, 2.0], [0.5, 0.7], [0.4, 0.6]))
    rows["rows"]["service-float32"]["accuracy"]["refused"] = 2
    assert ", 2 of 2 cases refused in float32 and counted as empty; int8 is **rightly kept**." in int8_verdict(rows)


def test_nothing_is_decided_without_numbers() -> None:
    mine = found([3.0, 3.0, 3.0], [], [])
    assert int8_verdict(document({**mine, "accuracy": None})).endswith("accuracy not measured, so nothing is decided.")
    assert int8_verdict({"rows": {}}) == "The service was not measured in int8 and in float32 in this run."
