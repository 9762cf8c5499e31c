"""Attributes of a DICOM data set, wherever they stand, as plain Python values."""

from typing import Any

import pydicom


def functional_group(dataset: pydicom.Dataset, frame: int, keyword: str) -> pydicom.Dataset:
    """Where a frame's attributes stand: its own group, the shared one, or the data set itself."""
    groups = [*dataset.get("PerFrameFunctionalGroupsSequence", [])[frame : frame + 1]]
    groups += dataset.get("SharedFunctionalGroupsSequence", [])[:1]
    for group in groups:
        if group.get(keyword):
            item: pydicom.Dataset = group[keyword][0]
            return item
    return dataset


def text(dataset: pydicom.Dataset, keyword: str) -> str:
    """All values in one string; empty where there is none."""
    return " ".join(texts(dataset, keyword)).strip()


def texts(dataset: pydicom.Dataset, keyword: str) -> list[str]:
    """Each value, without the blanks around it."""
    return [str(v).strip() for v in _values(dataset, keyword)]


def numbers(dataset: pydicom.Dataset, keyword: str) -> tuple[float, ...]:
    """Each value as a number.

    Raises
    ------
    ValueError, TypeError
        One is none.
    """
    return tuple(float(v) for v in _values(dataset, keyword))


def _values(dataset: pydicom.Dataset, keyword: str) -> list[Any]:
    value = dataset.get(keyword)
    if value is None:
        return []
    return [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)
