"""Tables, intervals and templates."""

import pytest

from training.experiments.markdown import fill_template, format_interval, refill, table
from training.experiments.metrics import Interval


def test_interval_is_formatted_with_its_ends() -> None:
    assert format_interval(Interval(0.684, 0.61, 0.73)) == "0.68 [0.61, 0.73]"
    assert format_interval(Interval(0.1, -0.05, 0.2), 1, signed=True) == "+0.1 [-0.1, +0.2]"
    assert format_interval(None) == ""


def test_row_of_another_width_is_refused() -> None:
    assert table(["a", "b"], [["1", "2"]]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    with pytest.raises(AssertionError):
        table(["a", "b"], [["1"]])


@pytest.mark.parametrize("values", [{"a": "1"}, {"a": "1", "b": "2", "c": "3"}])
def test_template_and_values_must_match(values: dict[str, str]) -> None:
    assert fill_template("{{a}} and {{b}}", {"a": "1", "b": "2"}) == "1 and 2"
    with pytest.raises(KeyError):
        fill_template("{{a}} and {{b}}", values)


def test_refilled_text_keeps_headings_paragraphs_and_bullets() -> None:
    text = "# A long heading that is not broken\n\none two\nthree\n\n- first of\n  all\n- second\n\nend\n"
    assert refill(text, 12) == (
        "# A long heading that is not broken\n\none two\nthree\n\n- first of\n  all\n- second\n\nend"
    )
    assert refill(text, 40).endswith("one two three\n\n- first of all\n- second\n\nend")
