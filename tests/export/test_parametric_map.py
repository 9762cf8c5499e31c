"""DICOM Parametric Map: values and positions of the anomaly map, in this and in other software."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from nibabel import affines
from PIL import Image

from app.dicom_attributes import silence_libraries
from app.export.dicom import DicomExport
from app.ingest.reader import read_scan
from app.volume import FloatArray, Scan
from tests.export.conftest import (
    BALLS,
    OBLIQUE,
    SHAPE,
    DicomResults,
    legacy_enhanced,
    read_series,
    turned_grid,
    write_results,
)
from tests.support.dicom import RAS_TO_LPS, Plane, Series, make_datasets
from tests.support.external_tools import require_tool
from tests.support.phantom import brain
from tests.support.results import make_result, on_grid

FIRST, LAST = 3, 19  # analysed slices


def make_anomaly(scan: Scan, peak: float = 0.9) -> FloatArray:
    """Return a map in which all analysed voxels of a slice differ, with NaN around them."""
    anomaly = np.full(scan.volume.shape, np.nan, np.float32)
    inside = anomaly[2:-3, 4:-1, FIRST : LAST + 1]
    inside[:] = np.linspace(0, peak, inside.size, dtype=np.float32).reshape(inside.shape)
    return anomaly


def write_map(path: Path, scan: Scan, anomaly: FloatArray) -> pydicom.Dataset:
    _, report = make_result(scan, BALLS)
    with silence_libraries():
        made = DicomExport(scan, report).parametric_map(anomaly)
        assert isinstance(made, pydicom.Dataset), made
        made.save_as(path, enforce_file_format=True)
    return pydicom.dcmread(path)


def read_points(made: pydicom.Dataset) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the LPS position (equation C.7.6.2.1-1 of PS3.3) and the real value of each pixel that is not padding."""
    shared = made.SharedFunctionalGroupsSequence[0]
    mapping = shared.RealWorldValueMappingSequence[0]
    orientation = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    row_spacing, column_spacing = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    stored = np.frombuffer(made.PixelData, np.uint16).reshape(made.NumberOfFrames, made.Rows, made.Columns)
    points, values = [], []
    for group, frame in zip(made.PerFrameFunctionalGroupsSequence, stored, strict=True):
        rows, columns = np.nonzero(frame != made.PixelPaddingValue)
        origin = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        offsets = (columns * column_spacing)[:, None] * orientation[:3] + (rows * row_spacing)[:, None] * orientation[
            3:
        ]
        points.append(origin + offsets)
        values.append(frame[rows, columns] * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept)
    return np.concatenate(points), np.concatenate(values)


def check_values(made: pydicom.Dataset, scan: Scan, anomaly: FloatArray) -> None:
    """Compare the position and the value of every pixel with the anomaly map."""
    points, values = read_points(made)
    voxels = affines.apply_affine(np.linalg.inv(RAS_TO_LPS @ scan.volume.affine), points)
    assert np.abs(voxels - voxels.round()).max() < 1e-3
    found = np.full(anomaly.shape, np.nan)
    found[tuple(voxels.round().astype(int).T)] = values
    step = float(made.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0].RealWorldValueSlope)
    assert step <= max(float(np.nanmax(anomaly)), 1e-6) / 13_000
    np.testing.assert_allclose(found, anomaly, atol=0.51 * step)  # NaN at the same voxels


@pytest.mark.parametrize("plane", get_args(Plane))
@pytest.mark.parametrize("turn", [(0, 0, 0), OBLIQUE])
def test_every_value_is_at_its_position(tmp_path: Path, plane: Plane, turn: tuple[float, float, float]) -> None:
    scan = read_series(tmp_path, Series(plane=plane), turned_grid(*turn))
    anomaly = make_anomaly(scan)
    made = write_map(tmp_path / "map", scan, anomaly)
    check_values(made, scan, anomaly)
    sources = {dataset.SOPInstanceUID: dataset for dataset in map(pydicom.dcmread, scan.source.instances)}
    assert made.NumberOfFrames == LAST - FIRST + 1
    for group in made.PerFrameFunctionalGroupsSequence:
        (item,) = group.DerivationImageSequence[0].SourceImageSequence
        position = sources[item.ReferencedSOPInstanceUID].ImagePositionPatient
        assert group.PlanePositionSequence[0].ImagePositionPatient == position


def test_enhanced_image(tmp_path: Path) -> None:
    legacy_enhanced(make_datasets(brain(SHAPE, turned_grid(*OBLIQUE)), Series())).save_as(tmp_path / "image")
    scan = read_scan(tmp_path / "image", scratch=tmp_path / "scratch")
    check_values(write_map(tmp_path / "map", scan, make_anomaly(scan)), scan, make_anomaly(scan))


def test_resampled_scan(tmp_path: Path) -> None:
    scan = on_grid(read_series(tmp_path, Series()), turned_grid(1.0, 2.0, 3.0))
    scan = replace(scan, source=replace(scan.source, resampled=True))
    made = write_map(tmp_path / "map", scan, make_anomaly(scan))
    check_values(made, scan, make_anomaly(scan))
    assert not any(group.get("DerivationImageSequence") for group in made.PerFrameFunctionalGroupsSequence)


@pytest.mark.parametrize("peak", [0.0, 3e-5, 0.65533, 0.99999, 1.0, 12.3])
def test_step_fits_the_peak(results: DicomResults, tmp_path: Path, peak: float) -> None:
    anomaly = make_anomaly(results.scan, peak)
    check_values(write_map(tmp_path / "map", results.scan, anomaly), results.scan, anomaly)


def test_map_without_a_value_is_padding(results: DicomResults, tmp_path: Path) -> None:
    made = write_map(tmp_path / "map", results.scan, np.full(SHAPE, np.nan, np.float32))
    assert (made.NumberOfFrames, set(made.PixelData)) == (SHAPE[2], {0})


def test_dcmtk_shows_the_map(results: DicomResults, tmp_path: Path) -> None:
    """The window of the object reaches from 0 to three times the threshold of 0.4. dcmtk must be told."""
    anomaly = make_anomaly(results.scan)
    window = write_map(tmp_path / "map", results.scan, anomaly).SharedFunctionalGroupsSequence[0].FrameVOILUTSequence[0]
    options = ("--frame", "9", "--set-window", window.WindowCenter, window.WindowWidth)
    require_tool("dcm2pnm")("--write-png", *options, tmp_path / "map", tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        shown = np.asarray(picture.convert("L")).T / 255 * 1.2
    np.testing.assert_allclose(shown, np.nan_to_num(anomaly[..., FIRST + 8]), atol=0.01)


def test_description(results: DicomResults) -> None:
    made, source = (pydicom.dcmread(path) for path in (results.parametric_map, results.scan.source.instances[0]))
    assert made.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert made.StudyInstanceUID == source.StudyInstanceUID
    assert made.SeriesInstanceUID != source.SeriesInstanceUID
    mapping = made.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    quantity = mapping.QuantityDefinitionSequence[0].ConceptCodeSequence[0]
    assert (quantity.CodeValue, quantity.CodingSchemeDesignator) == ("anomaly-score", "99COUNTERPART")
    assert mapping.MeasurementUnitsCodeSequence[0].CodeValue == "1"
    assert made.ContentQualification == "RESEARCH"
    assert made.ContentDescription == "Research use only. Not a medical device. Not for diagnosis."


def test_series_of_all_objects_differ(results: DicomResults, tmp_path: Path) -> None:
    healthy = write_results(tmp_path, results.scan, ())
    paths = [*results.paths, healthy.parametric_map, healthy.structured_report]
    assert len({pydicom.dcmread(path).SeriesInstanceUID for path in paths}) == len(paths)
