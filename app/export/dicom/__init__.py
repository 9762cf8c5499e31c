"""A result as objects that a PACS takes: a segmentation and a structured report beside the source series."""

from pathlib import Path

from pydicom.dataset import Dataset

from app.errors import CounterpartError, NoLesion, UnsuitableSource
from app.export.dicom.identity import complete
from app.export.dicom.segmentation import build_segmentation
from app.export.dicom.source import read_source
from app.export.dicom.structured_report import build_structured_report
from app.export.report import Report
from app.pipeline.findings import ScanResult
from app.volume import Scan

SEGMENTATION, STRUCTURED_REPORT = "segmentation.dcm", "report.dcm"


def write_dicom(out: Path, scan: Scan, result: ScanResult, report: Report) -> dict[str, CounterpartError]:
    """Write the DICOM objects of one analysis.

    The headers of the source are read again from `scan.source.instances`, and nothing of them is
    kept but what stands in the objects. Library warnings can hold header values: the caller
    silences them.

    Parameters
    ----------
    out : Path
        Existing folder; each file appears whole or not at all.
    scan : Scan
        From DICOM.
    result : Result
        On the scan's own grid.
    report : Report
        The same analysis in numbers; the objects repeat them.

    Returns
    -------
    dict of str to CounterpartError
        Why a file is absent, by its name: `NoLesion`, `UnsuitableSource`. A series that nothing
        can refer to costs the scan its DICOM objects and none of its other results.
    """
    try:
        segmentation, document = _build(scan, result, report)
    except UnsuitableSource as reason:
        return dict.fromkeys((SEGMENTATION, STRUCTURED_REPORT), reason)
    _write(out / STRUCTURED_REPORT, document)
    if segmentation is None:
        return {SEGMENTATION: _no_lesion()}
    _write(out / SEGMENTATION, segmentation)
    return {}


def _build(scan: Scan, result: ScanResult, report: Report) -> tuple[Dataset | None, Dataset]:
    """Segmentation (None without a lesion) and report, each under UIDs of its own content."""
    try:
        source = read_source(scan)
        segmentation = None
        if report.findings:
            segmentation = complete(build_segmentation(source, result.labels, report), source)
        return segmentation, complete(build_structured_report(source, segmentation, report), source)
    except (ValueError, TypeError, AttributeError, KeyError):
        # Without the cause: its text can hold a value of the header.
        raise UnsuitableSource(
            "A header of the series holds a value that DICOM does not allow, or lacks one that DICOM requires.",
            expected="patient, study and geometry attributes as DICOM PS3.3 defines them.",
            advice="The other results stand. Export the series again from the original for DICOM results.",
        ) from None


def _write(path: Path, dataset: Dataset) -> None:
    temporary = path.with_name(path.name + ".part")
    dataset.save_as(temporary, enforce_file_format=True)
    temporary.replace(path)


def _no_lesion() -> NoLesion:
    return NoLesion(
        "No voxel differs from the healthy counterpart by more than the threshold: there is nothing to segment.",
        expected="at least one finding.",
        advice="report.dcm states what was analysed; an empty segmentation is not written, viewers stumble over it.",
    )
