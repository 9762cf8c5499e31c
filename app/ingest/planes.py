"""Planes of a volume that cannot be of the same scan as their neighbours: empty, or of another scale.

A slice that was lost in a transfer, or whose rescale differs, changes the intensities of the whole scan, and nothing
is found in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from app.errors import InvalidVoxels
from app.ingest.volume_file import SAMPLES
from app.volume import FloatArray, Scan

# A plane is dark or bright if its level differs from both neighbours by this factor. Anatomy changes the level of
# planes of a few millimetres much less, except near the ends of the head, where the level is low.
LEVEL_FACTOR = 3.0
LEVEL_PERCENTILE = 95
# Only planes as bright as this fraction of the usual level are compared.
MIN_LEVEL = 0.5
USUAL_PERCENTILE = 75
# A longer run of planes is not a single fault. A bright organ can fill several planes, so the second limit is lower.
MAX_EMPTY_RUN, MAX_SCALED_RUN = 8, 3
MIN_PLANES = 10


@dataclass(frozen=True)
class FaultyPlanes:
    """Run of planes that differ from the planes on both sides.

    Attributes
    ----------
    axis : int
    first, last : int
        Indices along the axis.
    empty : bool
        Every voxel of each plane has one value.
    """

    axis: int
    first: int
    last: int
    empty: bool

    def describe(self, count: int) -> str:
        """Return the numbers of the planes, for a sentence."""
        numbers = f"{self.first + 1}" if self.first == self.last else f"{self.first + 1} to {self.last + 1}"
        return f"plane {numbers} of {count} along axis {self.axis + 1}"


def check_planes(scan: Scan) -> Scan:
    """Refuse empty planes inside a scan, and warn of planes of another scale.

    Returns
    -------
    Scan
        With a warning if planes are much darker or brighter than their neighbours.

    Raises
    ------
    InvalidVoxels
        If planes between others are empty.
    """
    shape = scan.volume.shape
    faults = [fault for axis in range(3) for fault in find_faulty_planes(scan.volume.array, axis)]
    empty = [fault for fault in faults if fault.empty]
    if empty:
        raise InvalidVoxels(
            f"Empty planes are inside the scan, {sum(fault.last - fault.first + 1 for fault in empty)} in all: "
            f"{empty[0].describe(shape[empty[0].axis])}{'' if len(empty) == 1 else ', and more'}.",
            expected="an image in every slice between the first and the last.",
            advice="Export the scan again, and check that every slice arrived.",
        )
    if not faults:
        return scan
    warning = (
        f"A part of the scan is at least {LEVEL_FACTOR:.0f} times as bright or dark as the planes on both sides: "
        f"{faults[0].describe(shape[faults[0].axis])}. It may have another scale, and the result may be wrong."
    )
    return replace(scan, source=replace(scan.source, warnings=(*scan.source.warnings, warning)))


def find_faulty_planes(array: FloatArray, axis: int) -> Iterator[FaultyPlanes]:
    """Yield the runs of planes across an axis that differ from the planes on both sides."""
    planes = np.moveaxis(array, axis, 0)
    if len(planes) < MIN_PLANES:
        return
    levels = _measure_levels(planes)
    usual = float(np.percentile(levels, USUAL_PERCENTILE))
    start = 1
    while start < len(planes) - 1:
        stop = _find_end(levels, start, usual)
        if stop > start:
            empty = all(plane.min() == plane.max() for plane in planes[start:stop])
            if empty or stop - start <= MAX_SCALED_RUN:
                yield FaultyPlanes(axis, start, stop - 1, empty)
        start = max(stop, start + 1)


def _measure_levels(planes: FloatArray) -> FloatArray:
    """Return a high percentile of each plane above the lowest value, from a sample of its voxels."""
    steps = tuple(slice(None, None, max(1, n // SAMPLES)) for n in planes.shape[1:])
    sample = planes[(slice(None), *steps)].reshape(len(planes), -1)
    return np.asarray(np.percentile(sample, LEVEL_PERCENTILE, axis=1) - sample.min(), dtype=np.float64)


def _find_end(levels: FloatArray, start: int, usual: float) -> int:
    """Return the index behind the run of dark or bright planes that begins at `start`, or `start` if there is none."""
    before = levels[start - 1]
    for stop in range(start + 1, min(start + MAX_EMPTY_RUN + 1, len(levels))):
        run, sides = levels[start:stop], (before, levels[stop])
        dark = run.max() * LEVEL_FACTOR < min(sides) and min(sides) > MIN_LEVEL * usual
        bright = run.min() > LEVEL_FACTOR * max(sides) and run.min() > LEVEL_FACTOR * MIN_LEVEL * usual
        if dark or bright:
            return stop
    return start
