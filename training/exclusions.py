"""Pictures that were looked at and are no healthy head, or none that stands upright: by name, each with its reason."""

import csv
from pathlib import Path

FOLDER = Path(__file__).parent / "splits"


def excluded_pictures(name: str) -> frozenset[str]:
    """Names of the excluded pictures of a committed list: `name,reason`."""
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names), "a picture is excluded twice"
    assert all(row["reason"] for row in rows), "an exclusion has no reason"
    return frozenset(names)
