"""Tables say what the rows of an evaluation say."""

from typing import Any

from training.tables import heads_table


def test_heads_are_counted_by_where_they_come_from() -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "IXI", "name": "a", "outcome": "analysed", "found_ml": 1.0},
        {"kind": "IXI", "name": "b", "outcome": "out_of_distribution", "found": "..."},
        {"kind": "IXI", "name": "c", "outcome": "analysed", "found_ml": 4.0},
        {"kind": "UIH", "name": "d", "outcome": "brain_not_extracted", "found": "..."},
    ]
    assert heads_table(rows)[2:] == [
        "| IXI | 2 of 3 | 2.50 (1.00 to 4.00) | out_of_distribution 1 |",
        "| UIH | 0 of 1 |  | brain_not_extracted 1 |",
    ]
