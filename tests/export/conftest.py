"""DICOM results of a phantom series with known lesions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from highdicom.legacy import LegacyConvertedEnhancedMRImage
from pydicom.dataset import FileDataset
from pydicom.uid import generate_uid

from app.dicom_attributes import silence_libraries
from app.errors import CounterpartError
from app.export.dicom import DicomExport
from app.export.report import Report
from app.ingest.reader import read_scan
from app.pipeline.findings import ScanResult
from app.volume import Affine, Scan, SegmentationType
from tests.support.dicom import Series, make_datasets, save
from tests.support.grids import tilted
from tests.support.phantom import brain, grid
from tests.support.results import Ball, make_result

SHAPE = (27, 33, 24)
SPACING = (5.2, 5.0, 5.6)
OBLIQUE = (9.0, -14.0, 21.0)  # degrees
# The balls have different sizes, so that a mirrored, transposed or swapped lesion is noticed.
BALLS: tuple[Ball, ...] = (((31.0, -14.0, 22.0), 16.0), ((-27.0, 38.0, -11.0), 11.0))
# Noise, so that swapped axes or colours are noticed.
PAGE = np.random.default_rng(5).integers(0, 256, (40, 51, 3), dtype=np.uint8)
OBJECTS = ("segmentation", "structured_report", "secondary_capture", "parametric_map")
Change = Callable[[list[FileDataset]], object]


@dataclass(frozen=True)
class DicomResults:
    """A scan, its findings and the DICOM objects that were written for it."""

    scan: Scan
    result: ScanResult
    report: Report
    absent: dict[str, CounterpartError]
    segmentation: Path
    structured_report: Path
    secondary_capture: Path
    parametric_map: Path

    @property
    def paths(self) -> tuple[Path, ...]:
        """The objects."""
        return tuple(getattr(self, name) for name in OBJECTS)


def turned_grid(*degrees: float) -> Affine:
    """Return the grid of these tests, rotated about x, y and z."""
    return tilted(grid(SHAPE, SPACING), *degrees)


def write_results(
    out: Path,
    scan: Scan,
    balls: Sequence[Ball] = BALLS,
    segmentation_type: SegmentationType = "binary",
    **changes: object,
) -> DicomResults:
    """Write the DICOM objects of a scan with balls as lesions; `changes` are fields of the report."""
    result, report = make_result(scan, balls)
    report = report.model_copy(update=changes)
    out.mkdir(parents=True, exist_ok=True)
    absent: dict[str, CounterpartError] = {}
    with silence_libraries():
        export = DicomExport(scan, report)
        segmentation, structured_report = export.segmentation_and_report(result.labels, segmentation_type)
        datasets = {
            "segmentation.dcm": segmentation,
            "report.dcm": structured_report,
            "capture.dcm": export.secondary_capture(PAGE if balls else PAGE[::-1]),
            "anomaly.dcm": export.parametric_map(result.anomaly),
        }
        for name, dataset in datasets.items():
            if isinstance(dataset, CounterpartError):
                absent[name] = dataset
            else:
                dataset.save_as(out / name, enforce_file_format=True)
    return DicomResults(scan, result, report, absent, *(out / name for name in datasets))


def read_series(folder: Path, series: Series, affine: Affine | None = None, change: Change | None = None) -> Scan:
    """Write a phantom as a series, change its data sets, and read it."""
    slices = make_datasets(brain(SHAPE, grid(SHAPE, SPACING) if affine is None else affine), series)
    if change:
        change(slices)
    save(folder / "series", slices)
    return read_scan(folder / "series", scratch=folder / "scratch")


def set_attributes(**values: object) -> Change:
    """Return a change that sets attributes in every slice; None deletes the attribute."""

    def change(slices: list[FileDataset]) -> None:
        for dataset in slices:
            for name, value in values.items():
                delattr(dataset, name) if value is None else setattr(dataset, name, value)

    return change


def legacy_enhanced(slices: list[FileDataset]) -> LegacyConvertedEnhancedMRImage:
    """Convert slices into one multi-frame image with highdicom, with the frames in random order."""
    set_attributes(
        BurnedInAnnotation="NO",
        VolumetricProperties="VOLUME",
        ContentDate="20200102",
        ContentTime="130000",
        AcquisitionDate="20200102",
        AcquisitionTime="130000",
        AcquisitionNumber=1,
    )(slices)
    shuffled = [slices[i] for i in np.random.default_rng(4).permutation(len(slices))]
    with silence_libraries():
        image = LegacyConvertedEnhancedMRImage(
            shuffled,
            generate_uid(entropy_srcs=["enhanced series"]),
            1,
            generate_uid(entropy_srcs=["enhanced"]),
            1,
        )
    del image.ClinicalTrialTimePointID  # highdicom adds it without a trial
    return image


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> DicomResults:
    """Return the results of a straight axial MR series with two lesions."""
    folder = tmp_path_factory.mktemp("results")
    return write_results(folder / "out", read_series(folder, Series()))
