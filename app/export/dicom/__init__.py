"""DICOM results: a segmentation and a structured report that belong to the study of the source series."""

from typing import TypeAlias

from pydicom.dataset import Dataset

from app.errors import NoLesion, UnsuitableSource
from app.export.dicom.identity import assign_uids
from app.export.dicom.segmentation import build_segmentation
from app.export.dicom.source import read_source
from app.export.dicom.structured_report import build_structured_report
from app.export.report import Report
from app.pipeline.findings import LabelArray
from app.volume import Scan

DicomObjects: TypeAlias = tuple[Dataset | NoLesion | UnsuitableSource, Dataset | UnsuitableSource]


def build_dicom_objects(scan: Scan, labels: LabelArray, report: Report) -> DicomObjects:
    """Build the DICOM Segmentation and the Structured Report of one analysis.

    The headers of the source are read again from `scan.source.instances`. Library warnings can contain header values:
    the caller silences them.

    Parameters
    ----------
    scan : Scan
        From DICOM.
    labels : (X, Y, Z) ndarray of integers
        Label of a finding on the scan's own grid, 0 elsewhere.
    report : Report
        The objects repeat its numbers.

    Returns
    -------
    segmentation, structured_report : Dataset or CounterpartError
        The object, or the reason why it does not exist: no lesion was found, or DICOM objects cannot refer to the
        series. A series without a frame of reference has a structured report alone. Other results do not depend on
        either.
    """
    try:
        source = read_source(scan)
        segmentation = None
        if report.findings and source.not_positioned is None:
            segmentation = assign_uids(build_segmentation(source, labels, report), source)
        structured_report = assign_uids(build_structured_report(source, segmentation, report), source)
    except UnsuitableSource as reason:
        return reason, reason
    except (ValueError, TypeError, AttributeError, KeyError):
        # The exception is not kept, because its text can contain a header value.
        invalid = UnsuitableSource(
            "A header of the series has an invalid value, or lacks a value that DICOM requires.",
            expected="patient, study and geometry attributes as defined in DICOM PS3.3.",
            advice="The other results are valid. For DICOM results, export the series again from the original.",
        )
        return invalid, invalid
    if segmentation is not None:
        return segmentation, structured_report
    return source.not_positioned if report.findings and source.not_positioned else _no_lesion(), structured_report


def _no_lesion() -> NoLesion:
    return NoLesion(
        "No voxel differs from the healthy counterpart by more than the threshold.",
        expected="at least one finding.",
        advice="Use report.dcm, which describes the analysed region. An empty segmentation is not written because "
        "many viewers cannot open it.",
    )
