"""Real series of several vendors; the expected numbers come from dcmtk and nibabel, or were read once and checked."""

from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from scipy import ndimage

from app.dicom_attributes import silence_libraries
from app.errors import CounterpartError
from app.ingest.dicom.pixels import Frame, read_frames
from app.ingest.reader import read_scan as read_into
from tests.ingest.conftest import Read

pytestmark = pytest.mark.data


@cache
def read_code(path: Path, scratch: Path) -> str:
    """Return "read", or the code of the error."""
    try:
        read_into(path, scratch=scratch)
    except CounterpartError as error:
        return error.code
    return "read"


@pytest.mark.parametrize(
    ("folder", "shape", "spacing", "axes"),
    [
        ("uih/uih_umr770_t1_sag", (460, 512, 32), (0.5, 0.5, 5.0), "PIR"),
        ("studyforrest/studyforrest_t1", (274, 384, 96), (0.69999, 0.66667, 2.66667), "LPS"),
    ],
)
def test_thick_slices_are_read(
    archives: Path,
    read_scan: Read,
    folder: str,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    axes: str,
) -> None:
    scan = read_scan(archives / folder)
    assert scan.volume.shape == shape
    np.testing.assert_allclose(scan.volume.spacing, spacing, atol=1e-4)
    assert "".join(nib.aff2axcodes(scan.volume.affine)) == axes
    assert (scan.source.modality, len(scan.source.instances)) == ("MR", shape[2])
    assert any("was not imaged" in note for note in scan.source.notes)


# The code, and fragments of the message that state place and size.
REFUSED: dict[str, tuple[str, list[str]]] = {
    "dicom2nifti/dicom2nifti/failing/gantrytilting/001": ("irregular_slices", ["14.0 degrees", "3.6 mm"]),
    "dicom2nifti/dicom2nifti/failing/notavolume/001": ("not_a_volume", ["4 images at one position"]),
    "dicom2nifti/dicom2nifti/failing/sliceincrement/001": (
        "irregular_slices",
        ["Slice 4 of 5 is missing", "slices 3 and 5 is 10.0 mm"],
    ),
    "dicom2nifti/dicom2nifti/failing/sliceincrement/002": (
        "irregular_slices",
        ["15.5 degrees", "0.8 mm", "Slice 4 of 5 is missing"],
    ),
    "ge/GE_HiSpeed_CT_head": (
        "irregular_slices",
        ["18.5 degrees", "48.2 mm", "1.1 to 7.0 mm", "7.0 mm between slices 24 and 25 of 28"],
    ),
    "dicom2nifti/dicom2nifti": ("several_patients", ["PatientBirthDate"]),
    "siemens/transfer_syntax": ("not_a_volume", ["9 Siemens mosaics", "35 slices"]),
    "pydicom/pydicom/MR_truncated.dcm": ("truncated_file", ["slice 1 of 1"]),
    "pydicom/pydicom/no_meta.dcm": ("not_an_image_format", []),
    "pydicom/pydicom/README.txt": ("not_an_image_format", []),
    "pydicom/pydicom/no_meta_group_length.dcm": ("truncated_file", ["1 of 1 DICOM files"]),
    "pydicom/pydicom/JPEG2000.dcm": ("wrong_modality", ["NM"]),
    "pydicom/pydicom-data/mlut_18.dcm": ("wrong_modality", ["OT"]),
    "pydicom/pydicom-data/HTJ2K_08_RGB.dcm": ("wrong_modality", ["no modality"]),
    "pydicom/pydicom-data/JLSL_RGB_ILV0.dcm": ("wrong_modality", ["no modality"]),
    "pydicom/pydicom-data/emri_small.dcm": ("invalid_geometry", ["position"]),
    "pydicom/pydicom-data/emri_small_jpeg_2k_lossless_too_short.dcm": ("invalid_geometry", ["position"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsuitable_files_are_refused_with_their_cause(archives: Path, read_scan: Read, name: str) -> None:
    with pytest.raises(CounterpartError) as refused:
        read_scan(archives / name)
    code, fragments = REFUSED[name]
    assert refused.value.code == code
    assert all(fragment in refused.value.found for fragment in fragments)


def test_every_failing_series_of_dicom2nifti_is_listed(archives: Path) -> None:
    root = archives / "dicom2nifti" / "dicom2nifti" / "failing"
    cases = {str(path.relative_to(archives)) for path in root.glob("*/*") if path.is_dir()}
    assert cases == {name for name in REFUSED if "failing" in name}


def test_every_file_alone_is_read_or_refused(archives: Path, tmp_path: Path) -> None:
    files = [path for path in archives.rglob("*") if path.is_file()]
    files = [path for path in files if not path.is_relative_to(archives / "ge")][::8]
    assert len(files) > 20
    assert {read_code(path, tmp_path) for path in files} >= {"read", "not_an_image_format", "wrong_modality"}


def test_a_tilted_head_ct_is_resampled_on_request(archives: Path, read_scan: Read) -> None:
    scan = read_scan(archives / "ge" / "GE_HiSpeed_CT_head", geometry="resample")
    # The sideways shift of 48.2 mm is 99 pixels. The head has 147.5 mm, and the lower slices a spacing of 4 mm.
    assert scan.volume.shape == (512, 611, 37)
    np.testing.assert_allclose(scan.volume.spacing, [0.488281, 0.488281, 4.0], atol=2e-3)
    notes = " ".join(scan.source.notes)
    assert all(fragment in notes for fragment in ("18.5 degrees", "7.0 mm apart", "37 regular slices", "4.00 mm"))
    # Slice 8 lies on a slice of the new grid: the same image, shifted by less than a pixel.
    slice_ = dcmread(scan.source.instances[8])
    corner = np.array(slice_.ImagePositionPatient, dtype=float) * [-1, -1, 1]
    x, y, z = (np.linalg.inv(scan.volume.affine) @ [*corner, 1])[:3]
    acquired = slice_.pixel_array.T * float(slice_.RescaleSlope) + float(slice_.RescaleIntercept)
    acquired = np.maximum(acquired, scan.volume.array.min())  # padding became background
    expected = ndimage.shift(acquired, (x - round(x), y - round(y)), order=1)[1:-1, 1:-1]
    found = scan.volume.array[round(x) + 1 : round(x) + 511, round(y) + 1 : round(y) + 511, round(z)]
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_nine_encodings_of_one_mosaic_are_one_volume(archives: Path, read_scan: Read) -> None:
    first, *others = (read_scan(archives / "siemens" / "transfer_syntax" / f"{i}.dcm") for i in range(1, 10))
    assert first.volume.shape == (64, 64, 35)
    assert first.volume.array.sum(dtype=np.float64) == 38036663  # of the whole image: its 36th tile is empty
    np.testing.assert_allclose(first.volume.spacing, [3.25, 3.25, 3.6], atol=1e-6)
    assert len(first.source.notes) == 1
    for other in others:
        np.testing.assert_array_equal(other.volume.array, first.volume.array)
        # Each encoder rewrote the decimal strings of the position.
        np.testing.assert_allclose(other.volume.affine, first.volume.affine, atol=1e-9)


def test_enhanced_multi_frame_images_are_read(archives: Path, read_scan: Read) -> None:
    root = archives / "dicom2nifti" / "dicom2nifti"
    philips, hyperfine = (read_scan(root / name / "anatomical" / "001") for name in ("philips_enhanced", "hyperfine"))
    assert philips.volume.shape == (256, 256, 8)
    np.testing.assert_allclose(philips.volume.spacing, [1, 1, 1.2], atol=1e-4)
    assert hyperfine.volume.shape == (112, 138, 8)
    np.testing.assert_allclose(hyperfine.volume.spacing, [1.59, 1.61, 5])
    assert len(philips.source.instances) == 1


def test_compressed_series_are_equal(archives: Path, read_scan: Read) -> None:
    root = archives / "dicom2nifti" / "dicom2nifti" / "generic"
    rle, jpegls = (read_scan(root / name / "001").volume for name in ("compressed_rle", "compressed_jpegls"))
    np.testing.assert_array_equal(rle.array, jpegls.array)
    np.testing.assert_array_equal(rle.affine, jpegls.affine)


def test_one_slice_in_eight_encodings_is_equal(archives: Path, read_scan: Read) -> None:
    names = ["", "_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_jpeg_ls_lossless", "_padded"]
    first, *others = (read_scan(archives / "pydicom" / "pydicom" / f"MR_small{name}.dcm") for name in names)
    assert first.volume.array.mean(dtype=np.float64) == pytest.approx(518.8806, abs=1e-3)
    for other in others:
        np.testing.assert_array_equal(other.volume.array, first.volume.array)


@pytest.mark.parametrize("name", ["JPEG-lossy", "JPGExtended"])
def test_twelve_bit_jpeg_equals_dcmtk(archives: Path, name: str) -> None:
    with silence_libraries():
        array, _ = read_frames([Frame(archives / "pydicom" / "pydicom" / f"{name}.dcm", 0)], 1024, 256)
    # Sum, maximum and one pixel from dcmdjpeg.
    assert (array.sum(dtype=np.float64), array.max(), array[128, 512, 0]) == (3767007, 264, 14)


@pytest.mark.parametrize(("bits", "expected"), [(8, (25000, 255, 125)), (16, (6007250, 65535, 32765))])
def test_near_lossless_jpeg_ls_equals_dcmtk(archives: Path, bits: int, expected: tuple[int, int, int]) -> None:
    path = archives / "pydicom" / "pydicom" / f"JPEGLSNearLossless_{bits:02d}.dcm"
    with silence_libraries():
        array, _ = read_frames([Frame(path, 0)], 45 if bits == 8 else 50, 10)
    # Sum, first and another pixel from dcmdjpls.
    assert (array.sum(dtype=np.float64), array[0, 0, 0], array[5, 5, 0]) == expected


@pytest.mark.parametrize(
    ("compressed", "plain"), [("pydicom/693_J2KI", "693_UNCI"), ("pydicom-data/693_J2KR", "693_UNCR")]
)
def test_a_ct_in_jpeg_2000_equals_the_uncompressed_one(
    archives: Path, read_scan: Read, compressed: str, plain: str
) -> None:
    """With loss (J2KI) and without; signed, 14 bits, rescaled, padded."""
    one = read_scan(archives / "pydicom" / f"{compressed}.dcm")
    path = archives / "pydicom" / "pydicom-data" / f"{plain}.dcm"
    two, dataset = read_scan(path), dcmread(path)
    np.testing.assert_array_equal(one.volume.array, two.volume.array)
    pixels = dataset.pixel_array.astype(np.float64)
    values = pixels * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    padding = pixels == dataset.PixelPaddingValue
    assert padding.sum() > 400
    np.testing.assert_array_equal(two.volume.array[:, :, 0].T[~padding], values[~padding])
    assert (two.volume.array[:, :, 0].T[padding] == values[~padding].min()).all()
    assert any(note.startswith(f"{padding.sum()} padding pixels") for note in two.source.notes)


def test_a_real_modality_look_up_table_is_applied(archives: Path) -> None:
    """The file is a secondary capture, so only its frame is read."""
    with silence_libraries():
        array, _ = read_frames([Frame(archives / "pydicom" / "pydicom-data" / "mlut_18.dcm", 0)], 512, 512)
    found = (array.sum(dtype=np.float64), array.min(), array.max(), array[0, 0, 0])
    assert found == (8697190668, 0, 65535, 32759)


def test_an_enhanced_ct_is_read(archives: Path, read_scan: Read) -> None:
    scan = read_scan(archives / "pydicom" / "pydicom-data" / "eCT_Supplemental.dcm")
    assert (scan.source.modality, scan.volume.shape[:2]) == ("CT", (512, 512))
    assert scan.volume.array.min() == -1024


@pytest.mark.parametrize("name", ["CT_pitch", "M2208_T2w", "MNI152_T1_2mm", "shear", "clinical_stroke_T2"])
def test_nifti_equals_nibabel(real_scans: Path, read_scan: Read, name: str) -> None:
    path = real_scans / "nifti_misc" / f"{name}.nii.gz"
    scan, image = read_scan(path), nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    np.testing.assert_array_equal(scan.volume.array, image.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(scan.volume.affine, image.affine)
