"""The mask as a DICOM Segmentation (PS3.3 A.51), BINARY, one segment a lesion."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from highdicom import CoordinateSystemNames, PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription

from app.export.dicom.identity import CATEGORY, SITE, TYPE, algorithm, common, tracking
from app.export.dicom.source import SourceSeries
from app.export.report import RESEARCH_USE_ONLY, Report
from app.pipeline.findings import LabelArray

SERIES_NUMBER = 9001
SERIES_DESCRIPTION = "Counterpart: lesions (research use only)"
CONTENT_LABEL = "COUNTERPART"
RED = (255, 64, 64)  # as in preview.png


def build_segmentation(source: SourceSeries, labels: LabelArray, report: Report) -> Segmentation:
    """Make the segmentation, without UIDs of its own yet.

    Parameters
    ----------
    source : SourceSeries
        What the mask was made from.
    labels : (X, Y, Z) ndarray of integers
        Label of a finding on the scan's grid, columns along X and rows along Y; 0 beside them.
    report : Report
        Names the findings and the model.
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
        **common(source, report),
        **_geometry(source, labels.shape[2]),
    )
    segmentation.ContentCreatorName = None  # type 2, and nobody did
    if source.frames:
        _name_frames(segmentation, source.frames)
    return segmentation


def _geometry(source: SourceSeries, count: int) -> dict[str, Any]:
    """Where the frames lie: on the source's slices, or where the scan was resampled to."""
    if source.positions is not None:
        return {"plane_positions": [_position(place) for place in source.positions]}
    spacing = np.linalg.norm(source.lps[:3, :3], axis=0)
    directions = source.lps[:3, :3] / spacing
    origins = source.lps[:3, 3] + np.arange(count)[:, None] * source.lps[:3, 2]
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


def _name_frames(segmentation: Segmentation, read: Collection[int]) -> None:
    """Name of an enhanced image the frames that were read, and no others of the same place, as highdicom does."""
    for group in segmentation.PerFrameFunctionalGroupsSequence:
        for derivation in group.get("DerivationImageSequence", []):
            named = [item for item in derivation.SourceImageSequence if int(item.ReferencedFrameNumber) in read]
            derivation.SourceImageSequence = named


def _position(place: Sequence[float]) -> PlanePositionSequence:
    return PlanePositionSequence(CoordinateSystemNames.PATIENT, image_position=place)


def _segment(source: SourceSeries, report: Report, label: int) -> SegmentDescription:
    name, uid = tracking(report, source.uid, label)
    return SegmentDescription(
        segment_number=label,
        segment_label=name,
        segmented_property_category=CATEGORY,
        segmented_property_type=TYPE,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm(report),
        tracking_id=name,
        tracking_uid=uid,
        anatomic_regions=[SITE],
        display_color=CIELabColor.from_rgb(*RED),
    )
