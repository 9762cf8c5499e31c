"""Tests of the page of an evaluation."""

from typing import Any

from tests.support.bundle import tiny_manifest
from training.evaluation_page import EARLIER, evaluation_page, heads_table


def test_heads_are_counted_by_kind() -> None:
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


def test_parts_of_an_earlier_bundle_are_marked() -> None:
    rows = [{"kind": "T2", "outcomes": {"out_of_distribution": 2}}]
    head = {"kind": "UIH", "name": "d", "outcome": "analysed", "found_ml": 1.0}
    document = {"foreign": {"bundle_sha256": "a", "rows": rows}, "heads": {"bundle_sha256": "b", "rows": [head]}}
    heads, foreign = evaluation_page(document, tiny_manifest(), "a").split(
        "### Scans outside the training distribution"
    )
    assert EARLIER in heads
    assert EARLIER not in foreign
    assert "| T2 | 2 of 2 | out_of_distribution 2 |" in foreign
