"""The error classes as a public contract: codes are stable, and every error helps."""

import re

import pytest

from app import errors
from app.errors import CannotAnalyse, CounterpartError, OutOfDistribution


def all_classes(root: type[CounterpartError] = CounterpartError) -> list[type[CounterpartError]]:
    return [root, *(c for sub in root.__subclasses__() if sub.__module__ == errors.__name__ for c in all_classes(sub))]


CLASSES = all_classes()


def test_every_class_is_found() -> None:
    named = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.CounterpartError)}
    assert set(CLASSES) == named
    assert len(CLASSES) > 30


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_each_cause_has_a_code_and_a_title_of_its_own(error: type[CounterpartError]) -> None:
    assert {"code", "title"} <= vars(error).keys(), "inherited from another cause"
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", error.code)
    assert error.title[0].isupper()
    assert error.title[-1] != "."
    assert len(error.title) < 60


def test_no_two_causes_share_a_code() -> None:
    assert len({c.code for c in CLASSES}) == len({c.title for c in CLASSES}) == len(CLASSES)


def test_an_error_tells_what_was_found_what_was_expected_and_what_to_do() -> None:
    error = OutOfDistribution("It is a knee.", expected="a brain.", advice="Send a brain.")
    assert str(error) == "It is a knee. Expected: a brain. Send a brain."
    assert error.problem == {
        "code": "out_of_distribution",
        "title": "Not the kind of image the model knows",
        "found": "It is a knee.",
        "expected": "a brain.",
        "advice": "Send a brain.",
    }
    assert isinstance(error, CannotAnalyse)


def test_expectation_and_advice_are_named() -> None:
    with pytest.raises(TypeError):
        CounterpartError("found", "expected", "advice")  # type: ignore[call-arg]
