"""Every broken or unsuitable file of the archives has a problem of its own; `scripts/list_refusals.py` lists all."""

from pathlib import Path

import pytest

from app.errors import CounterpartError
from tests.ingest.conftest import Read

pytestmark = pytest.mark.data

TILTED = "The slices are stacked at an angle of {} degrees to their normal (gantry tilt): the farthest is shifted"
NO_PLACE = "None of 1 images states its position, orientation and pixel spacing."
NOT_A_FORMAT = "The first bytes are those of no image format that Counterpart reads."
NO_MODALITY = "The images state no modality."
REFUSED = {
    "dicom2nifti/dicom2nifti/failing/gantrytilting/001": (
        "irregular_slices",
        f"{TILTED.format(14.0)} sideways by 3.6 mm.",
    ),
    "dicom2nifti/dicom2nifti/failing/notavolume/001": (
        "not_a_volume",
        "There are 4 images at one position: a time series, or several echoes, weightings or phases in one series.",
    ),
    "dicom2nifti/dicom2nifti/failing/sliceincrement/001": (
        "irregular_slices",
        "Slice 4 of 5 is missing: gap of 10.0 mm between 3 and 5 (counted from the feet up).",
    ),
    "dicom2nifti/dicom2nifti/failing/sliceincrement/002": (
        "irregular_slices",
        f"{TILTED.format(15.5)} sideways by 0.8 mm. Slice 4 of 5 is missing",
    ),
    "ge/GE_HiSpeed_CT_head": (
        "irregular_slices",
        f"{TILTED.format(18.5)} sideways by 48.2 mm. The slices are unevenly spaced",
    ),
    "dicom2nifti/dicom2nifti": ("several_series", "There are 6 MR or CT series."),
    "siemens/transfer_syntax": (
        "not_a_volume",
        "The series holds 9 Siemens mosaics, each a whole volume of 35 slices: a time series.",
    ),
    "pydicom/pydicom/MR_truncated.dcm": ("truncated_file", "The pixel data of slice 1 of 1 is incomplete or damaged."),
    "pydicom/pydicom/no_meta.dcm": ("not_an_image_format", NOT_A_FORMAT),
    "pydicom/pydicom/README.txt": ("not_an_image_format", NOT_A_FORMAT),
    "pydicom/pydicom/no_meta_group_length.dcm": ("truncated_file", "1 of 1 DICOM files break off inside the header"),
    "pydicom/pydicom/JPEG2000.dcm": ("wrong_modality", "The images are not MR or CT but NM."),
    "pydicom/pydicom-data/mlut_18.dcm": ("wrong_modality", "The images are not MR or CT but OT."),
    "pydicom/pydicom-data/HTJ2K_08_RGB.dcm": ("wrong_modality", NO_MODALITY),
    "pydicom/pydicom-data/JLSL_RGB_ILV0.dcm": ("wrong_modality", NO_MODALITY),
    "pydicom/pydicom-data/emri_small.dcm": ("invalid_geometry", NO_PLACE),
    "pydicom/pydicom-data/emri_small_jpeg_2k_lossless_too_short.dcm": ("invalid_geometry", NO_PLACE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_its_own_problem(archives: Path, read_scan: Read, name: str) -> None:
    with pytest.raises(CounterpartError) as refused:
        read_scan(archives / name)
    code, found = REFUSED[name]
    assert refused.value.code == code
    assert refused.value.found.startswith(found)
    assert all(text.endswith(".") for text in (refused.value.expected, refused.value.advice))


def test_every_failing_case_is_listed(archives: Path) -> None:
    root = archives / "dicom2nifti" / "dicom2nifti" / "failing"
    cases = {str(path.relative_to(archives)) for path in root.glob("*/*") if path.is_dir()}
    assert cases == {name for name in REFUSED if "failing" in name}
