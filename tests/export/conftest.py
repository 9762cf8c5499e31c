"""A series, a result on it, and the objects that are written of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import FileDataset
from scipy.spatial.transform import Rotation

from app.errors import CounterpartError
from app.export.dicom import write_dicom
from app.export.report import Report
from app.ingest.reader import read_scan
from app.dicom_attributes import silence_libraries
from app.pipeline.findings import Result
from app.volume import Affine, Scan
from tests.support.dicom import Series, make_datasets, save
from tests.support.phantom import brain, grid
from tests.support.results import Point, marked

SHAPE = (27, 33, 24)
SPACING = (5.2, 5.0, 5.6)
# Unequal, so that a mirrored, transposed or swapped lesion shows.
BALLS: tuple[tuple[Point, float], ...] = (((31.0, -14.0, 22.0), 16.0), ((-27.0, 38.0, -11.0), 11.0))
Change = Callable[[list[FileDataset]], object]


@dataclass(frozen=True)
class Written:
    """What went in and what came out."""

    scan: Scan
    result: Result
    report: Report
    absent: dict[str, CounterpartError]
    segmentation: Path
    structured_report: Path


def oblique(*degrees: float) -> Affine:
    """The grid of the tests, turned about x, y and z."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    return np.asarray(turn @ grid(SHAPE, SPACING))


def write(out: Path, scan: Scan, balls: Sequence[tuple[Point, float]] = BALLS, **changes: object) -> Written:
    """Write the objects of a scan in which balls were found; `changes` are fields of the report."""
    result, report = marked(scan, balls)
    report = report.model_copy(update=changes)
    out.mkdir(parents=True, exist_ok=True)
    with silence_libraries():
        absent = write_dicom(out, scan, result, report)
    return Written(scan, result, report, absent, out / "segmentation.dcm", out / "report.dcm")


def scan_of(folder: Path, series: Series, affine: Affine | None = None, change: Change | None = None) -> Scan:
    """Write a phantom as a series, change its data sets, and read it."""
    slices = make_datasets(brain(SHAPE, grid(SHAPE, SPACING) if affine is None else affine), series)
    if change:
        change(slices)
    save(folder / "series", slices)
    return read_scan(folder / "series", scratch=folder / "scratch")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The objects of a straight axial series with two lesions."""
    folder = tmp_path_factory.mktemp("written")
    return write(folder / "out", scan_of(folder, Series()))
