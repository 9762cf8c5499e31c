"""DICOM results, which belong to the study of the source series."""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from app.errors import NoLesion, UnsuitableSource
from app.export.dicom.identity import assign_uids
from app.export.dicom.parametric_map import build_parametric_map
from app.export.dicom.secondary_capture import build_secondary_capture
from app.export.dicom.segmentation import build_segmentation
from app.export.dicom.source import SourceSeries, read_source
from app.export.dicom.structured_report import build_structured_report
from app.export.report import Report
from app.pipeline.findings import LabelArray
from app.volume import FloatArray, Scan, SegmentationType

SegmentationAndReport: TypeAlias = tuple[Dataset | NoLesion | UnsuitableSource, Dataset | UnsuitableSource]
Built = TypeVar("Built")


class DicomExport:
    """The DICOM objects of one analysis.

    The headers of the source are read again from `scan.source.instances`, once. Library warnings can contain header
    values: the caller silences them. A reason instead of an object does not affect the other results.

    Parameters
    ----------
    scan : Scan
        From DICOM.
    report : Report
        The objects repeat its numbers.
    """

    def __init__(self, scan: Scan, report: Report) -> None:
        self._report = report
        self._source = _or_reason(lambda: read_source(scan))

    def segmentation_and_report(
        self, labels: LabelArray, segmentation_type: SegmentationType = "binary"
    ) -> SegmentationAndReport:
        """Build the segmentation, and the structured report that contains its UIDs.

        Parameters
        ----------
        labels : (X, Y, Z) ndarray of integers
            Label of a finding on the scan's own grid, 0 elsewhere.
        segmentation_type : {"binary", "labelmap"}

        Returns
        -------
        segmentation, structured_report : Dataset or CounterpartError
            The object, or the reason why it does not exist: no lesion was found, or DICOM objects cannot refer to the
            series. A series without a frame of reference has a structured report alone.
        """
        source, report = self._source, self._report
        if isinstance(source, UnsuitableSource):
            return source, source

        def build() -> tuple[Dataset | None, Dataset]:
            segmentation = None
            if report.findings and source.not_positioned is None:
                segmentation = assign_uids(build_segmentation(source, labels, report, segmentation_type), source)
            return segmentation, assign_uids(build_structured_report(source, segmentation, report), source)

        built = _or_reason(build)
        if isinstance(built, UnsuitableSource):
            return built, built
        segmentation, structured_report = built
        if segmentation is not None:
            return segmentation, structured_report
        return source.not_positioned if report.findings and source.not_positioned else _no_lesion(), structured_report

    def parametric_map(self, anomaly: FloatArray) -> Dataset | UnsuitableSource:
        """Build the parametric map of the anomaly map, (X, Y, Z), NaN where the scan was not analysed."""
        return self._build(
            lambda source: (
                source.not_positioned or assign_uids(build_parametric_map(source, anomaly, self._report), source)
            )
        )

    def secondary_capture(self, page: npt.NDArray[np.uint8]) -> Dataset | UnsuitableSource:
        """Build the secondary capture of the report page, (H, W, 3)."""
        return self._build(lambda source: assign_uids(build_secondary_capture(source, page, self._report), source))

    def _build(self, build: Callable[[SourceSeries], Dataset | UnsuitableSource]) -> Dataset | UnsuitableSource:
        source = self._source
        return source if isinstance(source, UnsuitableSource) else _or_reason(lambda: build(source))


def _or_reason(build: Callable[[], Built]) -> Built | UnsuitableSource:
    """Return what a function builds, or the reason why DICOM objects cannot refer to the series."""
    try:
        return build()
    except UnsuitableSource as reason:
        return reason
    except (ValueError, TypeError, AttributeError, KeyError):
        # The exception is not kept, because its text can contain a header value.
        return UnsuitableSource(
            "A header of the series has an invalid value, or lacks a value that DICOM requires.",
            expected="patient, study and geometry attributes as defined in DICOM PS3.3.",
            advice="The other results are valid. For DICOM results, export the series again from the original.",
        )


def _no_lesion() -> NoLesion:
    return NoLesion(
        "No voxel differs from the healthy counterpart by more than the threshold.",
        expected="at least one finding.",
        advice="Use report.dcm, which describes the analysed region. An empty segmentation is not written because "
        "many viewers cannot open it.",
    )
