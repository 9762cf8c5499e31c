"""Fixture of all tests that use pynetdicom."""

import gc
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _close_sockets() -> Iterator[None]:
    """Close the sockets of broken connections. pynetdicom leaves them to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()
