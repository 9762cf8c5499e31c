"""DICOM Secondary Capture (PS3.3 A.8.1) of the report page.

Every viewer shows this class, also those that open neither segmentations nor structured reports. The page is one
single-frame instance: viewers know the single-frame class best. The text "Research use only" is part of the pixels.
"""

import numpy as np
import numpy.typing as npt
from highdicom import CoordinateSystemNames, PatientOrientationValuesBiped, PhotometricInterpretationValues
from highdicom.sc import SCImage
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.valuerep import DA, TM

from app.export.dicom.identity import shared_arguments
from app.export.dicom.source import LOSSY, SourceSeries
from app.export.report import RESEARCH_USE_ONLY, Report

SERIES_NUMBER = 9003
SERIES_DESCRIPTION = "Counterpart: page (research use only)"
# Directions of rows and columns in every panel of the page.
TOWARDS = (PatientOrientationValuesBiped.L, PatientOrientationValuesBiped.P)
# `content_qualification` has no counterpart in the modules of this class.
_NOT_IN_CLASS = ("content_date", "content_time", "content_qualification")
# `SCImage.from_ref_dataset` does not support every character set.
_COPIED = {
    "study_instance_uid": "StudyInstanceUID",
    "patient_id": "PatientID",
    "patient_name": "PatientName",
    "patient_birth_date": "PatientBirthDate",
    "patient_sex": "PatientSex",
    "accession_number": "AccessionNumber",
    "study_id": "StudyID",
    "study_date": "StudyDate",
    "study_time": "StudyTime",
    "referring_physician_name": "ReferringPhysicianName",
}


def build_secondary_capture(source: SourceSeries, page: npt.NDArray[np.uint8], report: Report) -> SCImage:
    """Build the capture with placeholder UIDs.

    Parameters
    ----------
    source : SourceSeries
        Series of the scan.
    page : (H, W, 3) ndarray of uint8
        Page with key slices, outlines, numbers and warnings. It must contain no patient data.
    report : Report
        Contains the model.
    """
    arguments = shared_arguments(source, report)
    image = source.images[0]
    capture = SCImage(
        pixel_array=page,
        photometric_interpretation=PhotometricInterpretationValues.RGB,
        bits_allocated=8,
        coordinate_system=CoordinateSystemNames.PATIENT,
        patient_orientation=TOWARDS,
        series_number=SERIES_NUMBER,
        series_description=SERIES_DESCRIPTION,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        **{argument: image[keyword].value for argument, keyword in _COPIED.items()},
        **{name: value for name, value in arguments.items() if name not in _NOT_IN_CLASS},
    )
    # These attributes contain the time of writing. The standard does not require them.
    del capture.DateOfSecondaryCapture, capture.TimeOfSecondaryCapture
    date, time = source.content_time
    capture.ContentDate, capture.ContentTime = DA(date), TM(time)
    capture.ConversionType = "WSD"  # drawn by a computer
    capture.ImageType = ["DERIVED", "SECONDARY"]
    capture.BodyPartExamined = "BRAIN"  # not paired: no laterality is required
    capture.BurnedInAnnotation = "NO"  # no text of the page identifies the patient
    capture.ImageComments = RESEARCH_USE_ONLY
    capture.DerivationDescription = "Page of the findings: key slices with outlines"
    for name in (name for name in LOSSY if name in image):
        setattr(capture, name, image[name].value)
    capture.SourceImageSequence = [_reference(image) for image in source.evidence]
    return capture


def _reference(image: Dataset) -> Dataset:
    """Return the reference to an image from which the page was made (PS3.3 C.7.6.1.1.4)."""
    item, purpose = Dataset(), Dataset()
    code = codes.DCM.SourceImageForImageProcessingOperation
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = code.value, "DCM", code.meaning
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    item.PurposeOfReferenceCodeSequence = [purpose]
    return item
