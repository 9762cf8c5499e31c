"""Calls that must not take longer than a number of seconds, whatever they wait for."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def run_within(seconds: float, function: Callable[[], T]) -> T:
    """Return the result of a function, or raise its exception.

    Raises
    ------
    TimeoutError
        The function takes longer. Its thread continues, and it does not delay the end of the process.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]
