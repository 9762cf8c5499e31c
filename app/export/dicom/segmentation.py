"""DICOM Segmentation (PS3.3 A.51) or Label Map Segmentation (PS3.3 A.51.5.2) with one segment per lesion."""

import numpy as np
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription

from app.export.dicom.frames import plane_geometry, reference_images
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
from app.volume import SegmentationType

SERIES_NUMBER = 9001
SERIES_DESCRIPTION = "Counterpart: lesions (research use only)"
CONTENT_LABEL = "COUNTERPART"
RED = (255, 64, 64)  # the colour of the mask in preview.png


def build_segmentation(
    source: SourceSeries, labels: LabelArray, report: Report, segmentation_type: SegmentationType = "binary"
) -> Segmentation:
    """Build the segmentation with placeholder UIDs.

    Parameters
    ----------
    source : SourceSeries
        Series of the scan.
    labels : (X, Y, Z) ndarray of integers
        Label of a finding on the scan's grid, 0 elsewhere. X runs along columns, Y along rows, Z along slices.
    report : Report
        Contains the findings and the model.
    segmentation_type : {"binary", "labelmap"}
    """
    segmentation = Segmentation(
        source_images=source.images,
        pixel_array=np.ascontiguousarray(labels.transpose(2, 1, 0), dtype=np.uint16),  # (slices, rows, columns)
        segmentation_type=SegmentationTypeValues[segmentation_type.upper()],
        segment_descriptions=[_segment(source, report, finding.label) for finding in report.findings],
        series_number=SERIES_NUMBER,
        content_label=CONTENT_LABEL,
        content_description=RESEARCH_USE_ONLY,
        series_description=SERIES_DESCRIPTION,
        **shared_arguments(source, report),
        **plane_geometry(source, labels.shape[2]),
    )
    segmentation.ContentCreatorName = None  # type 2; there is no creator
    reference_images(segmentation, source)
    return segmentation


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
