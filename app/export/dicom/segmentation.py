"""DICOM Segmentation (PS3.3 A.51) of type BINARY with one segment per lesion."""

import copy
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from highdicom import CoordinateSystemNames, PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from pydicom.dataset import Dataset

from app.export.dicom.identity import (
    CATEGORY,
    SITE,
    TYPE,
    algorithm_identification,
    shared_arguments,
    tracking_identifiers,
)
from app.export.dicom.source import SourceSeries
from app.export.report import RESEARCH_USE_ONLY, Report
from app.pipeline.findings import LabelArray

SERIES_NUMBER = 9001
SERIES_DESCRIPTION = "Counterpart: lesions (research use only)"
CONTENT_LABEL = "COUNTERPART"
RED = (255, 64, 64)  # the colour of the mask in preview.png


def build_segmentation(source: SourceSeries, labels: LabelArray, report: Report) -> Segmentation:
    """Build the segmentation with placeholder UIDs.

    Parameters
    ----------
    source : SourceSeries
        Series of the scan.
    labels : (X, Y, Z) ndarray of integers
        Label of a finding on the scan's grid, 0 elsewhere. X runs along columns, Y along rows, Z along slices.
    report : Report
        Contains the findings and the model.
    """
    segmentation = Segmentation(
        source_images=source.images,
        pixel_array=np.ascontiguousarray(labels.transpose(2, 1, 0), dtype=np.uint16),  # (slices, rows, columns)
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[_segment(source, report, finding.label) for finding in report.findings],
        series_number=SERIES_NUMBER,
        content_label=CONTENT_LABEL,
        content_description=RESEARCH_USE_ONLY,
        series_description=SERIES_DESCRIPTION,
        **shared_arguments(source, report),
        **_geometry(source, labels.shape[2]),
    )
    segmentation.ContentCreatorName = None  # type 2; there is no creator
    if source.frames:
        _reference_frames(segmentation, source.frames)
    if source.origins:
        _reference_origins(segmentation, source)
    return segmentation


def _geometry(source: SourceSeries, count: int) -> dict[str, Any]:
    """Return the positions of the frames: those of the source slices if they match, else those of the grid."""
    if source.positions is not None:
        return {"plane_positions": [_position(position) for position in source.positions]}
    spacing = np.linalg.norm(source.lps_affine[:3, :3], axis=0)
    directions = source.lps_affine[:3, :3] / spacing
    origins = source.lps_affine[:3, 3] + np.arange(count)[:, None] * source.lps_affine[:3, 2]  # (count, 3)
    return {
        "plane_positions": [_position(origin.tolist()) for origin in origins],
        "plane_orientation": PlaneOrientationSequence(
            CoordinateSystemNames.PATIENT, [*directions[:, 0].tolist(), *directions[:, 1].tolist()]
        ),
        "pixel_measures": PixelMeasuresSequence(
            pixel_spacing=[float(spacing[1]), float(spacing[0])],  # between rows, between columns
            slice_thickness=float(spacing[2]),
            spacing_between_slices=float(spacing[2]),
        ),
    }


def _reference_frames(segmentation: Segmentation, frames: Collection[int]) -> None:
    """Refer only to the frames of an enhanced image that were read.

    highdicom refers to all frames at the same position.
    """
    for group in segmentation.PerFrameFunctionalGroupsSequence:
        for derivation in group.get("DerivationImageSequence", []):
            derivation.SourceImageSequence = [
                item for item in derivation.SourceImageSequence if int(item.ReferencedFrameNumber) in frames
            ]


def _reference_origins(segmentation: Segmentation, source: SourceSeries) -> None:
    """Refer to the files of a concatenation in place of the one image with all their frames."""
    groups = (*segmentation.PerFrameFunctionalGroupsSequence, *segmentation.SharedFunctionalGroupsSequence)
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
    (series,) = segmentation.ReferencedSeriesSequence
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


def _segment(source: SourceSeries, report: Report, label: int) -> SegmentDescription:
    tracking_id, tracking_uid = tracking_identifiers(report, source.uid, label)
    return SegmentDescription(
        segment_number=label,
        segment_label=tracking_id,
        segmented_property_category=CATEGORY,
        segmented_property_type=TYPE,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm_identification(report),
        tracking_id=tracking_id,
        tracking_uid=tracking_uid,
        anatomic_regions=[SITE],
        display_color=CIELabColor.from_rgb(*RED),
    )
