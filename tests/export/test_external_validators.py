"""Every kind of object that is written, before judges of other makers."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from nibabel import affines

from app.ingest import read
from app.ingest.quiet import quiet
from app.volume import Scan
from tests.export.conftest import SHAPE, Written, oblique, scan_of, write
from tests.export.test_segmentation import enhanced
from tests.support.dicom import RAS_TO_LPS, Series, datasets
from tests.support.external_tools import require_tool
from tests.support.phantom import brain
from tests.support.results import Point
from tests.support.segmentation import segment_points
from training.archives import unpack

DATA = Path(os.environ.get("COUNTERPART_DATA", Path(__file__).parents[3] / "shared" / "data"))
# What dciodvfy says of a private coding scheme, and of patient data that the source has not.
MEANT = ("Unrecognized defined term = <99COUNTERPART>", "that would be needed to build DICOMDIR")


def anonymised(scan_folder: Path) -> Scan:
    def bare(slices: list[pydicom.FileDataset]) -> None:
        for dataset in slices:
            for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"):
                setattr(dataset, name, "")
            del dataset.SeriesDate, dataset.SliceThickness

    return scan_of(scan_folder, Series(modality="CT", plane="sagittal"), oblique(8, 4, -13), bare)


def japanese(folder: Path) -> Scan:
    def change(slices: list[pydicom.FileDataset]) -> None:
        for dataset in slices:
            dataset.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
            dataset.PatientName = "Yamada^Tarou=山田^太郎"

    return scan_of(folder, Series(), change=change)


def multi_frame(folder: Path) -> Scan:
    image = enhanced(datasets(brain(SHAPE, oblique(5, 5, 5)), Series(plane="coronal")))
    image.save_as(folder / "image", enforce_file_format=True)
    return read(folder / "image", scratch=folder / "scratch")


def resampled_grid(folder: Path) -> Scan:
    from tests.support.results import resampled

    return resampled(scan_of(folder, Series()), oblique(3, -2, 1))


CASES = {
    "axial MR": lambda folder: scan_of(folder, Series()),
    "oblique coronal MR": lambda folder: scan_of(folder, Series(plane="coronal"), oblique(9, -14, 21)),
    "anonymised sagittal CT": anonymised,
    "two character sets": japanese,
    "enhanced": multi_frame,
    "resampled": resampled_grid,
}


@pytest.fixture(scope="module", params=CASES)
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("judged")
    with quiet():
        written = write(folder / "out", CASES[request.param](folder))
        write(folder / "healthy", written.scan, ())
    assert written.absent == {}
    return written


def objects(written: Written) -> list[Path]:
    """Segmentation, report, and the report of a scan without a lesion."""
    return [
        written.segmentation,
        written.structured_report,
        written.segmentation.parents[1] / "healthy" / "report.dcm",
    ]


def test_dciodvfy_finds_no_fault(judged: Written) -> None:
    dciodvfy = require_tool("dciodvfy")
    for path in objects(judged):
        said = [line for line in dciodvfy("-new", path).splitlines() if line.startswith(("Error", "Warning"))]
        assert [line for line in said if not any(meant in line for meant in MEANT)] == [], path.name


def test_dcentvfy_finds_patient_and_study_alike(judged: Written) -> None:
    """Attributes of patient, study and frame of reference agree over source, segmentation and report."""
    dcentvfy = require_tool("dcentvfy")
    said = dcentvfy(*judged.scan.source.instances, *objects(judged), check=False)
    # It takes the accession number of an SR for one of its series.
    assert [line for line in said.splitlines() if "<AccessionNumber>" not in line] == []


def test_dcmtk_reads_every_object(judged: Written, tmp_path: Path) -> None:
    dcm2xml, dsrdump = require_tool("dcm2xml"), require_tool("dsrdump")
    for path in objects(judged):
        dcm2xml("+Ca", "latin-1", path, tmp_path / "out.xml")
        assert (tmp_path / "out.xml").stat().st_size > 1000
    for path in objects(judged)[1:]:
        said = dsrdump("+Pl", path)
        assert "Research use only. Not a medical device. Not for diagnosis." in said
        faults = [line for line in said.splitlines() if line.startswith(("E:", "W:", "F:"))]
        # Debian's dcmtk cannot look inside two-byte characters.
        assert [line for line in faults if "SpecificCharacterSet" not in line.replace(" ", "")] == []


# ---- real series -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (DATA / "dicom").is_dir():
        pytest.skip("COUNTERPART_DATA holds no DICOM archives")
    folder = tmp_path_factory.mktemp("archives")
    for name in ("uih_umr770", "studyforrest", "dicom2nifti"):
        (path,) = (DATA / "dicom").glob(f"{name}*.tar.xz")
        unpack(path, folder)
    return folder


REAL = {
    "UIH sagittal": "uih_umr770_t1_sag",
    "Siemens axial": "studyforrest_t1",
    "Philips enhanced": "dicom2nifti/philips_enhanced/anatomical/001",
    "Hyperfine enhanced": "dicom2nifti/hyperfine/anatomical/001",
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_series(archives: Path, tmp_path: Path, name: str) -> None:
    folder = archives / REAL[name]
    with quiet():
        if "enhanced" in name:
            scan = read(folder, scratch=tmp_path / "scratch")
            refused = write(tmp_path, scan, ()).absent["segmentation.dcm"]
            assert refused.found == "The series does not state FrameOfReferenceUID in every image."
            folder = _with_frame_of_reference(folder, tmp_path)
        scan = read(folder, scratch=tmp_path / "scratch")
        (big, small), radius = _places(scan)
        written = write(tmp_path / "out", scan, ((big, radius), (small, radius * 0.7)))
    assert written.absent == {}
    found = segment_points(written.segmentation)
    for label, finding in enumerate(written.report.findings, start=1):
        np.testing.assert_allclose(found[label].mean(axis=0), RAS_TO_LPS[:3, :3] @ finding.centroid_mm, atol=1e-3)
    segimage2itkimage, dciodvfy = require_tool("segimage2itkimage"), require_tool("dciodvfy")
    segimage2itkimage("--inputDICOM", written.segmentation, "--outputDirectory", tmp_path, "-t", "nii", "-p", "seg")
    for label, finding in enumerate(written.report.findings, start=1):
        image = nib.load(tmp_path / f"seg-{label}.nii.gz")
        assert isinstance(image, nib.Nifti1Image)
        points = affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) > 0))
        np.testing.assert_allclose(points.mean(axis=0), finding.centroid_mm, atol=0.02)
    for path in (written.segmentation, written.structured_report):
        faults = [line for line in dciodvfy("-new", path).splitlines() if line.startswith("Error")]
        assert faults == [], path.name


def _with_frame_of_reference(folder: Path, target: Path) -> Path:
    """The image with what its anonymisation took away."""
    (path,) = (p for p in folder.iterdir() if p.is_file())
    dataset = pydicom.dcmread(path)
    dataset.FrameOfReferenceUID = "1.2.3.4"
    dataset.save_as(target / "image.dcm")
    return target / "image.dcm"


def _places(scan: Scan) -> tuple[tuple[Point, Point], float]:
    """Two places inside a volume of any size, and a radius that keeps balls there apart."""
    shape = np.array(scan.volume.shape)
    places = [affines.apply_affine(scan.volume.affine, shape * share) for share in ((0.3, 0.35, 0.4), (0.7, 0.6, 0.6))]
    apart = float(np.linalg.norm(places[0] - places[1]))
    first, second = ((float(x), float(y), float(z)) for x, y, z in places)
    return (first, second), apart / 3
