"""Acquisitions of one series that overlap, for example two ranges of a head CT that share their border slice.

The longest acquisition is complete in the result. Every other one loses the images inside the extent of a longer one,
and adds the rest. A mixture of interleaved images of two acquisitions would show a head that moved in between.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.errors import IrregularSlices
from app.ingest.dicom.geometry import (
    MAX_SPACING_ERROR_MM,
    Float64Array,
    IntArray,
    Plane,
    count_images_per_position,
    describe_place,
)


@dataclass(frozen=True, eq=False)
class Overlap:
    """Images of one acquisition that lie inside the extent of a longer one.

    Attributes
    ----------
    acquisition : int
        AcquisitionNumber.
    images : (N,) ndarray of int
        Indices of the images that lie inside.
    total : int
        Number of images of the acquisition.
    """

    acquisition: int
    images: IntArray
    total: int

    def describe(self, planes: Sequence[Plane], size: tuple[int, int]) -> str:
        """Return the number and the place of the images, for a note or an error."""
        place = describe_place([planes[i] for i in self.images], *size)
        return f"{len(self.images)} of {self.total} images of acquisition {self.acquisition} ({place})"


def find_overlaps(planes: Sequence[Plane]) -> list[Overlap]:
    """Return the images that other acquisitions show, if some positions have several images.

    Parameters
    ----------
    planes : sequence of Plane
        Frames of one stack, in any order.

    Returns
    -------
    list of Overlap
        Empty if the acquisitions do not overlap, are not numbered or have several images at one position themselves,
        and if no position has a single image, as in a time series.
    """
    positions = np.array([plane.position for plane in planes])
    counts = count_images_per_position(planes) if np.isfinite(positions).all() else np.ones(1)
    if counts.max() == 1 or counts.min() > 1:
        return []
    groups: dict[int | None, list[int]] = defaultdict(list)
    for index, plane in enumerate(planes):
        groups[plane.acquisition].append(index)
    numbered = {number: np.array(images) for number, images in groups.items() if number is not None}
    if len(numbered) < len(groups) or any(_shares_positions(planes, images) for images in numbered.values()):
        return []
    orientation = planes[0].orientation
    return _compare_extents(positions @ np.cross(orientation[:3], orientation[3:]), numbered)


def _shares_positions(planes: Sequence[Plane], images: IntArray) -> bool:
    return bool(count_images_per_position([planes[i] for i in images]).max() > 1)


def _compare_extents(distances: Float64Array, numbered: dict[int, IntArray]) -> list[Overlap]:
    """Return the images of each acquisition that lie inside the extent of a longer one."""
    extents: list[tuple[float, float]] = []
    overlaps = []
    for number, images in sorted(numbered.items(), key=lambda item: (-len(item[1]), item[0])):
        own = distances[images]
        inside = np.zeros(len(images), dtype=bool)
        for low, high in extents:
            inside |= (own >= low - MAX_SPACING_ERROR_MM) & (own <= high + MAX_SPACING_ERROR_MM)
        if inside.any():
            overlaps.append(Overlap(number, images[inside], len(images)))
        extents.append((float(own.min()), float(own.max())))
    return overlaps


def check_overlaps(overlaps: Sequence[Overlap], planes: Sequence[Plane], size: tuple[int, int], *, join: bool) -> None:
    """Refuse acquisitions that overlap, unless they are to be joined and each adds at least half of its images.

    Parameters
    ----------
    overlaps : sequence of Overlap
    planes : sequence of Plane
        Frames of the stack.
    size : tuple of int
        Rows and columns of a frame.
    join : bool
        The caller chose to resample.

    Raises
    ------
    IrregularSlices
    """
    repeats = [overlap for overlap in overlaps if 2 * len(overlap.images) > overlap.total]
    if not overlaps or (join and not repeats):
        return
    places = "; ".join(overlap.describe(planes, size) for overlap in repeats or overlaps)
    join_them = " Or choose `--geometry resample` or `?geometry=resample`: the longer acquisition is kept there."
    raise IrregularSlices(
        f"Several acquisitions of the series show the same region. A longer one covers {places}.",
        expected="one image at each position.",
        advice=f"Send the images of one acquisition (AcquisitionNumber).{'' if repeats else join_them}",
    )
