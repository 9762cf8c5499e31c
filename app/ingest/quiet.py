"""The imaging libraries warn and log with header values in the text: keep that to ourselves."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# nibabel's own logger writes to standard error whatever the application configured.
_TALKATIVE = ("pydicom", "highdicom", "nibabel", "nibabel.global")
# `warnings.catch_warnings` is global to the process: two threads inside it would restore each
# other's filters. Readers take turns.
_turn = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and library loggers while a patient's file is read."""
    with _turn, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        yield
