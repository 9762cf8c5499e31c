"""DICOM Secondary Capture: pixels, references, and how dcmtk shows it."""

from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import SecondaryCaptureImageStorage

from tests.export.conftest import PAGE, DicomResults
from tests.support.external_tools import require_tool


def test_pixels_are_those_of_the_page(results: DicomResults) -> None:
    made = pydicom.dcmread(results.secondary_capture)
    assert (made.SOPClassUID, made.Modality) == (SecondaryCaptureImageStorage, "OT")
    assert (made.PhotometricInterpretation, made.BurnedInAnnotation) == ("RGB", "NO")
    np.testing.assert_array_equal(np.frombuffer(made.PixelData, np.uint8)[: PAGE.size].reshape(PAGE.shape), PAGE)


def test_dcmtk_shows_the_page(results: DicomResults, tmp_path: Path) -> None:
    require_tool("dcm2pnm")("--write-png", results.secondary_capture, tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), PAGE)


def test_capture_belongs_to_the_study_and_names_the_images(results: DicomResults) -> None:
    made = pydicom.dcmread(results.secondary_capture)
    sources = [pydicom.dcmread(path) for path in results.scan.source.instances]
    assert made.StudyInstanceUID == sources[0].StudyInstanceUID
    assert made.SeriesInstanceUID not in {pydicom.dcmread(path).SeriesInstanceUID for path in results.paths[:2]}
    assert "FrameOfReferenceUID" not in made
    named = {(item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) for item in made.SourceImageSequence}
    assert named == {(source.SOPClassUID, source.SOPInstanceUID) for source in sources}
    assert made.ImageComments == "Research use only. Not a medical device. Not for diagnosis."
    assert (made.ManufacturerModelName, made.DeviceSerialNumber) == ("tiny-0.0.1", "5a" * 32)
