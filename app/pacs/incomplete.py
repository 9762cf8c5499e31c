"""Marks of received series that may be incomplete: images were refused, or an association did not end normally.

::

    node/refused/<series>/<instance>     empty file: the instance was refused, and did not arrive later
    node/transfers/<series>/<name>       empty file: an association began to send the series and did not end normally
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.jobs.store import sync_to_disk


@dataclass(frozen=True)
class TransferFaults:
    """Reasons why a series may be incomplete.

    Attributes
    ----------
    refused : int
        Number of refused instances that did not arrive later.
    interrupted : bool
        An association with instances of the series did not end normally, and no other one repeated the series.
    """

    refused: int
    interrupted: bool


class TransferMarks:
    """Marks of the series of a spool, and the associations that are open.

    It is not safe for threads: the spool calls it under its lock. Series and instances are named by their keys.

    Parameters
    ----------
    root : Path
        Folder of the spool.
    known_instances : callable
        Returns the instances of a series that wait, or that are in its last job.
    """

    def __init__(self, root: Path, known_instances: Callable[[str], set[str]]) -> None:
        self._refused, self._transfers = root / "refused", root / "transfers"
        for folder in (self._refused, self._transfers):
            folder.mkdir(exist_ok=True, mode=0o700)
        self._known_instances = known_instances
        # For each open association: its instances, by series. The series that it sends now is the last one.
        self._open: dict[str, dict[str, set[str]]] = {}

    def refuse(self, series: str, instance: str) -> bool:
        """Note that an instance is refused, until it arrives. Return False if it arrived before or is noted."""
        path = self._refused / series / instance
        if path.exists() or instance in self._known_instances(series):
            return False
        _mark(path)
        return True

    def current_series(self, association: str) -> str | None:
        """Return the series that an association sends now, or None before its first instance is stored."""
        series = self._open.get(association)
        return _last(series) if series else None

    def begin(self, association: str, series: str) -> None:
        """Note that an association sends a series, before its instance is stored."""
        sent = self._open.setdefault(association, {})
        if sent and _last(sent) != series:
            self._end_series(association, sent)
        sent[series] = sent.pop(series, set())  # the last one
        _mark(self._transfers / series / association)

    def arrive(self, series: str, instance: str, association: str | None) -> None:
        """Note that an instance is stored."""
        (self._refused / series / instance).unlink(missing_ok=True)
        if association is not None:
            self._open[association][series].add(instance)

    def release(self, association: str) -> None:
        """Note that an association ended normally."""
        sent = self._open.pop(association, {})
        if sent:
            self._end_series(association, sent)

    def abort(self, association: str, waiting: Callable[[str], bool]) -> list[str]:
        """Note that an association did not end normally, and return those of its series that wait and are marked."""
        marked = [series for series in self._open.pop(association, {}) if waiting(series)]
        for series in marked:
            _mark(self._transfers / series / association)
        return marked

    def _end_series(self, association: str, sent: dict[str, set[str]]) -> None:
        """Remove the mark of the last series of an association: its transfer ended normally.

        The marks of other associations are removed only if this one sent every instance of the series that the spool
        knows. Then the sender has repeated the whole series. An association that sent only the rest is no proof,
        because a sender may leave out the instance at which its association was aborted.
        """
        series = _last(sent)
        (self._transfers / series / association).unlink(missing_ok=True)
        if not _names(self._transfers / series):
            return  # there is no other mark, and the next lines take long for a series of many images
        if self._known_instances(series) <= sent[series]:
            shutil.rmtree(self._transfers / series, ignore_errors=True)
            # One of the others may be the broken connection, which ends only after a time-out.
            for other in self._open.values():
                if other is not sent:
                    other.pop(series, None)

    def series_in_transfer(self) -> set[str]:
        """Return the series that open associations send now."""
        return {_last(sent) for sent in self._open.values() if sent}

    def read(self, series: str) -> TransferFaults:
        """Return the reasons why a series may be incomplete."""
        return TransferFaults(len(_names(self._refused / series)), bool(_names(self._transfers / series)))

    def forget(self, series: str) -> None:
        """Remove the marks of a series."""
        for folder in (self._refused, self._transfers):
            shutil.rmtree(folder / series, ignore_errors=True)

    def older_than(self, before: float) -> Iterator[str]:
        """Yield the series whose marks have not changed since a time in seconds since the epoch."""
        for folder in (*self._refused.iterdir(), *self._transfers.iterdir()):
            with suppress(FileNotFoundError):
                if folder.stat().st_mtime < before:
                    yield folder.name


def _last(sent: dict[str, set[str]]) -> str:
    return next(reversed(sent))


def _names(folder: Path) -> set[str]:
    """Return the names in a folder, none if it does not exist."""
    with suppress(FileNotFoundError):
        return {path.name for path in folder.iterdir()}
    return set()


def _mark(path: Path) -> None:
    """Create an empty file that survives a power failure."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.touch()
        sync_to_disk(path.parent, path.parent.parent)
