"""DICOM attributes as plain Python values, and imaging libraries that stay silent while they are read.

Shared by `app.ingest` and `app.export`. This module does not import pydicom, because that import takes two
seconds which a NIfTI scan does not need.
"""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom import Dataset

# nibabel's own logger writes to standard error, whatever the application has configured.
_LOGGERS = ("pydicom", "highdicom", "nibabel", "nibabel.global")
# `warnings.catch_warnings` is global to the process: two threads inside it restore each other's filters.
_lock = threading.RLock()


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Silence warnings and library loggers, whose text can contain a patient's values.

    Only one thread at a time runs inside this context.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        yield


def functional_group(dataset: "Dataset", frame: int, keyword: str) -> "Dataset":
    """Return the data set that contains the attributes of one functional group for one frame (PS3.3 C.7.6.16).

    Parameters
    ----------
    dataset : Dataset
        Header of a single-frame or an enhanced image.
    frame : int
        Index of the frame, from 0.
    keyword : str
        Keyword of the functional group's sequence, for example "PlanePositionSequence".

    Returns
    -------
    Dataset
        The item of the frame's own functional groups, else of the shared ones. `dataset` itself if neither
        contains the group, as in a single-frame image.
    """
    groups = [*dataset.get("PerFrameFunctionalGroupsSequence", [])[frame : frame + 1]]
    groups += dataset.get("SharedFunctionalGroupsSequence", [])[:1]
    for group in groups:
        if group.get(keyword):
            item: Dataset = group[keyword][0]
            return item
    return dataset


def text(dataset: "Dataset", keyword: str) -> str:
    """Return all values of an attribute as one string, or an empty string if it is absent."""
    return " ".join(texts(dataset, keyword)).strip()


def texts(dataset: "Dataset", keyword: str) -> list[str]:
    """Return each value of an attribute as a string without surrounding blanks."""
    return [str(value).strip() for value in _values(dataset, keyword)]


def numbers(dataset: "Dataset", keyword: str) -> tuple[float, ...]:
    """Return each value of an attribute as a float. A text of several values (UT, LT) is split.

    Raises
    ------
    ValueError, TypeError
        If a value is not a number.
    """
    parts = [
        part for value in _values(dataset, keyword) for part in (_split(value) if isinstance(value, str) else [value])
    ]
    return tuple(float(part) for part in parts)


def optional_numbers(dataset: "Dataset", keyword: str) -> tuple[float, ...]:
    """Return each value of an attribute as a float, or no value if one is not a number.

    A decimal comma is read as a point. Do not use this for the geometry of an image.
    """
    try:
        return numbers(dataset, keyword)
    except Exception:  # noqa: BLE001 - pydicom raises different exceptions for different values
        return _numbers_with_comma(dataset, keyword)


def _numbers_with_comma(dataset: "Dataset", keyword: str) -> tuple[float, ...]:
    element = dataset.get_item(keyword)
    content = element.value if element else None
    if not isinstance(content, bytes):
        return ()
    try:
        return tuple(float(part.replace(",", ".")) for part in _split(content.decode("ascii")))
    except ValueError:
        return ()


def _split(content: str) -> list[str]:
    return [part.strip(" \0") for part in content.split("\\")]


def _values(dataset: "Dataset", keyword: str) -> list[Any]:
    value = dataset.get(keyword)
    if value is None:
        return []
    return [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)
