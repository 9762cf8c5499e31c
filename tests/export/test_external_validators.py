"""DICOM results are valid for programs of other makers."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from nibabel import affines

from app.dicom_attributes import silence_libraries
from app.ingest.reader import read_scan
from app.volume import Scan
from tests.export.conftest import (
    OBLIQUE,
    SHAPE,
    DicomResults,
    legacy_enhanced,
    read_series,
    set_attributes,
    turned_grid,
    write_results,
)
from tests.support.dicom import RAS_TO_LPS, Plane, Series, make_datasets
from tests.support.external_tools import require_tool
from tests.support.phantom import brain
from tests.support.results import Point, on_grid
from tests.support.segmentation import segment_points
from training.data import unpack_archive

# Warnings of dciodvfy about the private coding scheme, about patient data that the source lacks, and about a term of
# PS3.3 C.8.32.2.1 that its dictionary lacks.
EXPECTED_WARNINGS = (
    "Unrecognized defined term = <99COUNTERPART>",
    "that would be needed to build DICOMDIR",
    "Unrecognized defined term = <QUANTITY>",
)
ANONYMISE = set_attributes(
    **dict.fromkeys(("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"), ""),
    SeriesDate=None,
    SliceThickness=None,
)
TWO_CHARACTER_SETS = set_attributes(SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName="Yamada^Tarou=山田^太郎")


def read_multi_frame(folder: Path) -> Scan:
    image = legacy_enhanced(make_datasets(brain(SHAPE, turned_grid(5, 5, 5)), Series(plane="coronal")))
    image.save_as(folder / "image", enforce_file_format=True)
    return read_scan(folder / "image", scratch=folder / "scratch")


CASES: dict[str, Callable[[Path], Scan]] = {
    "axial MR": lambda folder: read_series(folder, Series()),
    "oblique coronal MR": lambda folder: read_series(folder, Series(plane="coronal"), turned_grid(*OBLIQUE)),
    "anonymised sagittal CT": lambda folder: read_series(
        folder, Series(modality="CT", plane="sagittal"), turned_grid(8, 4, -13), ANONYMISE
    ),
    "two character sets": lambda folder: read_series(folder, Series(), change=TWO_CHARACTER_SETS),
    "enhanced": read_multi_frame,
    "resampled": lambda folder: on_grid(read_series(folder, Series()), turned_grid(3, -2, 1)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DicomResults:
    folder = tmp_path_factory.mktemp("case")
    with silence_libraries():
        results = write_results(folder / "out", CASES[request.param](folder))
        write_results(folder / "healthy", results.scan, ())
    assert results.absent == {}
    return results


def objects(results: DicomResults) -> list[Path]:
    """Return the objects, and those of the same scan without a lesion."""
    healthy = results.segmentation.parents[1] / "healthy"
    return [*results.paths, *sorted(healthy.glob("*.dcm"))]


def check_with_dcmqi(results: DicomResults, folder: Path, atol: float) -> None:
    """Compare the centroids that dcmqi (ITK and DCMTK) reads with those of the mask."""
    segimage2itkimage = require_tool("segimage2itkimage")
    segimage2itkimage("--inputDICOM", results.segmentation, "--outputDirectory", folder, "-t", "nii", "-p", "seg")
    for finding in results.report.findings:
        image = nib.load(folder / f"seg-{finding.label}.nii.gz")
        assert isinstance(image, nib.Nifti1Image)
        points = affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) > 0))
        np.testing.assert_allclose(points.mean(axis=0), finding.centroid_mm, atol=atol)


@pytest.mark.parametrize("turn", [(0, 0, 0), OBLIQUE])
@pytest.mark.parametrize("plane", ["axial", "sagittal", "coronal"])
def test_dcmqi_reads_the_same_positions(tmp_path: Path, plane: Plane, turn: tuple[float, float, float]) -> None:
    results = write_results(tmp_path / "out", read_series(tmp_path, Series(plane=plane), turned_grid(*turn)))
    check_with_dcmqi(results, tmp_path, 1e-3)


def test_dciodvfy_finds_no_error(case: DicomResults) -> None:
    dciodvfy = require_tool("dciodvfy")
    for path in objects(case):
        lines = [line for line in dciodvfy("-new", path).splitlines() if line.startswith(("Error", "Warning"))]
        assert [line for line in lines if not any(text in line for text in EXPECTED_WARNINGS)] == [], path.name


def test_dcentvfy_finds_no_conflict_between_objects(case: DicomResults) -> None:
    """Attributes of patient, study and frame of reference agree in source, segmentation and report."""
    dcentvfy = require_tool("dcentvfy")
    output = dcentvfy(*case.scan.source.instances, *objects(case), check=False)
    # dcentvfy treats the accession number of an SR as an attribute of its series.
    assert [line for line in output.splitlines() if "<AccessionNumber>" not in line] == []


def test_dcmtk_reads_every_object(case: DicomResults, tmp_path: Path) -> None:
    dcm2xml, dsrdump = require_tool("dcm2xml"), require_tool("dsrdump")
    for path in objects(case):
        dcm2xml("+Ca", "latin-1", path, tmp_path / "out.xml")
        assert (tmp_path / "out.xml").stat().st_size > 1000
    for path in (path for path in objects(case) if path.name == "report.dcm"):
        output = dsrdump("+Pl", path)
        assert "Research use only. Not a medical device. Not for diagnosis." in output
        faults = [line for line in output.splitlines() if line.startswith(("E:", "W:", "F:"))]
        # Debian's dcmtk does not support two-byte character sets.
        assert [line for line in faults if "SpecificCharacterSet" not in line.replace(" ", "")] == []


# ---- real series -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archives(real_scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (real_scans / "dicom").is_dir():
        pytest.skip("COUNTERPART_DATA has no DICOM archives")
    folder = tmp_path_factory.mktemp("archives")
    for name in ("uih_umr770", "studyforrest", "dicom2nifti"):
        (path,) = (real_scans / "dicom").glob(f"{name}*.tar.xz")
        unpack_archive(path, folder)
    return folder


REAL_SERIES = {
    "UIH sagittal": "uih_umr770_t1_sag",
    "Siemens axial": "studyforrest_t1",
    "Philips enhanced": "dicom2nifti/philips_enhanced/anatomical/001",
    "Hyperfine enhanced": "dicom2nifti/hyperfine/anatomical/001",
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL_SERIES)
def test_real_series(archives: Path, tmp_path: Path, name: str) -> None:
    folder = archives / REAL_SERIES[name]
    with silence_libraries():
        if "enhanced" in name:
            scan = read_scan(folder, scratch=tmp_path / "scratch")
            (first, second), radius = _two_centres(scan)
            alone = write_results(tmp_path / "report alone", scan, ((first, radius), (second, radius * 0.7)))
            assert "FrameOfReferenceUID" in alone.absent["segmentation.dcm"].found
            lines = require_tool("dciodvfy")("-new", alone.structured_report).splitlines()
            assert [line for line in lines if line.startswith("Error")] == []
            folder = _set_frame_of_reference(folder, tmp_path)
        scan = read_scan(folder, scratch=tmp_path / "scratch")
        (first, second), radius = _two_centres(scan)
        results = write_results(tmp_path / "out", scan, ((first, radius), (second, radius * 0.7)))
    assert results.absent == {}
    segments = segment_points(results.segmentation)
    for finding in results.report.findings:
        centroid = segments[finding.label].mean(axis=0)
        np.testing.assert_allclose(centroid, RAS_TO_LPS[:3, :3] @ finding.centroid_mm, atol=1e-3)
    check_with_dcmqi(results, tmp_path, 0.02)
    dciodvfy = require_tool("dciodvfy")
    for path in results.paths:
        errors = [line for line in dciodvfy("-new", path).splitlines() if line.startswith("Error")]
        assert errors == [], path.name


def _set_frame_of_reference(folder: Path, target: Path) -> Path:
    """Write the image with the UID that was removed when it was anonymised."""
    (path,) = (p for p in folder.iterdir() if p.is_file())
    dataset = pydicom.dcmread(path)
    dataset.FrameOfReferenceUID = "1.2.3.4"
    dataset.save_as(target / "image.dcm")
    return target / "image.dcm"


def _two_centres(scan: Scan) -> tuple[tuple[Point, Point], float]:
    """Return two positions inside a volume of any size, and a radius for balls that do not touch."""
    shape = np.array(scan.volume.shape)
    centres = [affines.apply_affine(scan.volume.affine, shape * part) for part in ((0.3, 0.35, 0.4), (0.7, 0.6, 0.6))]
    radius = float(np.linalg.norm(centres[0] - centres[1])) / 3
    first, second = ((float(x), float(y), float(z)) for x, y, z in centres)
    return (first, second), radius
