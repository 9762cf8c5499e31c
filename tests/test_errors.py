"""The error classes are a public contract: codes are stable and each class has its own."""

import re

import pytest

from app import errors
from app.errors import CannotAnalyse, CounterpartError, InternalError, OutOfDistribution, from_problem


def all_classes(root: type[CounterpartError] = CounterpartError) -> list[type[CounterpartError]]:
    return [root, *(c for sub in root.__subclasses__() if sub.__module__ == errors.__name__ for c in all_classes(sub))]


CLASSES = all_classes()


def test_every_exception_of_the_module_is_a_counterpart_error() -> None:
    exceptions = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.CounterpartError)
    }
    assert set(CLASSES) == exceptions


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_class_has_a_code_and_a_title_of_its_own(error: type[CounterpartError]) -> None:
    assert {"code", "title"} <= vars(error).keys()
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", error.code)
    assert re.fullmatch(r"[A-Z].{0,58}[^.]", error.title)


def test_codes_and_titles_are_unique() -> None:
    assert len({c.code for c in CLASSES}) == len({c.title for c in CLASSES}) == len(CLASSES)


def test_problem_contains_found_expected_and_advice() -> None:
    error = OutOfDistribution("It is a knee.", expected="a brain.", advice="Send a brain.")
    assert str(error) == "It is a knee. Expected: a brain. Send a brain."
    assert error.problem == {
        "code": "out_of_distribution",
        "title": OutOfDistribution.title,
        "found": "It is a knee.",
        "expected": "a brain.",
        "advice": "Send a brain.",
    }
    assert isinstance(error, CannotAnalyse)


def test_error_is_rebuilt_from_its_problem() -> None:
    error = OutOfDistribution("It is a knee.", expected="a brain.", advice="Send a brain.")
    rebuilt = from_problem(error.problem)
    assert type(rebuilt) is OutOfDistribution
    assert rebuilt.problem == error.problem
    assert type(from_problem({**error.problem, "code": "unknown"})) is InternalError


def test_expected_and_advice_are_keyword_arguments() -> None:
    with pytest.raises(TypeError):
        CounterpartError("found", "expected", "advice")  # type: ignore[call-arg]
