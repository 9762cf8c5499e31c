"""Frames of the multi-frame DICOM objects: their position, and their references to the source."""

import copy
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from highdicom import CoordinateSystemNames, PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence
from pydicom.dataset import Dataset

from app.export.dicom.source import SourceSeries


def plane_geometry(source: SourceSeries, count: int, slices: slice = slice(None)) -> dict[str, Any]:
    """Return the arguments of highdicom for the position of the frames.

    They are the positions of the source slices if these match, else those of the grid.

    Parameters
    ----------
    source : SourceSeries
    count : int
        Slices of the scan.
    slices : slice
        Slices that the object contains.
    """
    if source.positions is not None:
        return {"plane_positions": [_position(position) for position in source.positions[slices]]}
    spacing = np.linalg.norm(source.lps_affine[:3, :3], axis=0)
    directions = source.lps_affine[:3, :3] / spacing
    origins = source.lps_affine[:3, 3] + np.arange(count)[:, None] * source.lps_affine[:3, 2]  # (count, 3)
    return {
        "plane_positions": [_position(origin.tolist()) for origin in origins[slices]],
        "plane_orientation": PlaneOrientationSequence(
            CoordinateSystemNames.PATIENT, [*directions[:, 0].tolist(), *directions[:, 1].tolist()]
        ),
        "pixel_measures": PixelMeasuresSequence(
            pixel_spacing=[float(spacing[1]), float(spacing[0])],  # between rows, between columns
            slice_thickness=float(spacing[2]),
            spacing_between_slices=float(spacing[2]),
        ),
    }


def reference_images(dataset: Dataset, source: SourceSeries) -> None:
    """Correct the references of a multi-frame object to frames of its source."""
    if source.frames:
        _reference_frames(dataset, source.frames)
    if source.origins:
        _reference_origins(dataset, source)


def _reference_frames(dataset: Dataset, frames: Collection[int]) -> None:
    """Refer only to the frames of an enhanced image that were read.

    highdicom refers to all frames at the same position.
    """
    for group in dataset.PerFrameFunctionalGroupsSequence:
        for derivation in group.get("DerivationImageSequence", []):
            derivation.SourceImageSequence = [
                item for item in derivation.SourceImageSequence if int(item.ReferencedFrameNumber) in frames
            ]


def _reference_origins(dataset: Dataset, source: SourceSeries) -> None:
    """Refer to the files of a concatenation in place of the one image with all their frames."""
    groups = (*dataset.PerFrameFunctionalGroupsSequence, *dataset.SharedFunctionalGroupsSequence)
    for derivation in (item for group in groups for item in group.get("DerivationImageSequence", [])):
        items = []
        for item in derivation.SourceImageSequence:
            stated = item.get("ReferencedFrameNumber")
            numbers = [stated] if isinstance(stated, int) else list(stated or range(1, len(source.origins) + 1))
            frames: dict[str, list[int]] = {}
            for uid, number in (source.origins[int(number) - 1] for number in numbers):
                frames.setdefault(uid, []).append(number)
            items += [_refer(item, uid, own) for uid, own in frames.items()]
        derivation.SourceImageSequence = items
    (series,) = dataset.ReferencedSeriesSequence
    (instance,) = series.ReferencedInstanceSequence
    series.ReferencedInstanceSequence = [_refer(instance, uid) for uid in dict(source.origins)]


def _refer(item: Dataset, uid: str, frames: Sequence[int] = ()) -> Dataset:
    """Return a copy of a reference that names another image and, if given, its frames."""
    copied = copy.deepcopy(item)
    copied.ReferencedSOPInstanceUID = uid
    if frames:
        copied.ReferencedFrameNumber = list(frames) if len(frames) > 1 else frames[0]
    return copied


def _position(position: Sequence[float]) -> PlanePositionSequence:
    return PlanePositionSequence(CoordinateSystemNames.PATIENT, image_position=position)
