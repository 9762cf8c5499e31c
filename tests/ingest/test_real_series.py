"""Real series of several vendors, where the data folder is at hand."""

from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread
from scipy import ndimage

from app.errors import CounterpartError, NotAVolume
from app.ingest.reader import read_scan
from app.ingest import volume_file
from app.ingest.limits import DEFAULT_LIMITS
from app.ingest.dicom.pixels import Frame, read_frames
from app.dicom_attributes import silence_libraries
from tests.ingest.conftest import Read

pytestmark = pytest.mark.data


@cache
def outcome(path: Path, scratch: Path) -> str:
    """The code of the error, or "read"."""
    try:
        read_scan(path, scratch=scratch)
    except CounterpartError as error:
        return error.code
    return "read"


@pytest.mark.parametrize(
    ("folder", "shape", "spacing", "axes", "modality"),
    [
        ("uih/uih_umr770_t1_sag", (460, 512, 32), (0.5, 0.5, 5.0), "PIR", "MR"),
        ("studyforrest/studyforrest_t1", (274, 384, 96), (0.69999, 0.66667, 2.66667), "LPS", "MR"),
    ],
)
def test_series_that_are_read(  # noqa: PLR0913 - a row of the table
    archives: Path,
    read_scan: Read,
    folder: str,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    axes: str,
    modality: str,
) -> None:
    scan = read_scan(archives / folder)
    assert scan.volume.shape == shape
    np.testing.assert_allclose(scan.volume.spacing, spacing, atol=1e-4)
    assert "".join(nib.aff2axcodes(scan.volume.affine)) == axes
    assert (scan.source.modality, len(scan.source.instances)) == (modality, shape[2])
    assert any("what lies between was not seen" in note for note in scan.source.notes)


@pytest.mark.parametrize(
    ("folder", "messages"),
    [
        (
            "ge/GE_HiSpeed_CT_head",
            ["18.5 degrees", "sideways by 48.2 mm", "1.1 to 7.0 mm", "7.0 mm between slices 24 and 25 of 28"],
        ),
        ("dicom2nifti/dicom2nifti/failing/gantrytilting/001", ["14.0 degrees"]),
        (
            "dicom2nifti/dicom2nifti/failing/sliceincrement/001",
            ["Slice 4 of 5 is missing: gap of 10.0 mm between 3 and 5"],
        ),
        ("dicom2nifti/dicom2nifti/failing/sliceincrement/002", ["15.5 degrees", "Slice 4 of 5 is missing"]),
        ("dicom2nifti/dicom2nifti/failing/notavolume/001", ["4 images at one position"]),
    ],
)
def test_series_that_are_refused_with_the_place(
    archives: Path, read_scan: Read, folder: str, messages: list[str]
) -> None:
    with pytest.raises(CounterpartError) as refused:
        read_scan(archives / folder)
    assert refused.value.code == ("not_a_volume" if "notavolume" in folder else "irregular_slices")
    assert all(message in refused.value.found for message in messages)


def test_the_tilted_head_ct_resampled_by_choice(archives: Path, read_scan: Read) -> None:
    scan = read_scan(archives / "ge" / "GE_HiSpeed_CT_head", geometry="resample")
    # 48.2 mm to the side are 99 pixels; 147.5 mm of head at the lower slices' 4 mm.
    assert scan.volume.shape == (512, 611, 37)
    np.testing.assert_allclose(scan.volume.spacing, [0.488281, 0.488281, 4.0], atol=2e-3)
    notes = " ".join(scan.source.notes)
    assert "18.5 degrees" in notes
    assert "up to 7.0 mm apart, onto 37 slices at a right angle and 4.00 mm apart" in notes
    # A slice whose place is one of the new ones: the same picture, moved by less than a pixel.
    slice_ = dcmread(scan.source.instances[8])
    corner = np.array(slice_.ImagePositionPatient, dtype=float) * [-1, -1, 1]
    x, y, z = (np.linalg.inv(scan.volume.affine) @ [*corner, 1])[:3]
    acquired = slice_.pixel_array.T * float(slice_.RescaleSlope) + float(slice_.RescaleIntercept)
    acquired = np.maximum(acquired, scan.volume.array.min())  # padding became background
    there = ndimage.shift(acquired, (x - round(x), y - round(y)), order=1)[1:-1, 1:-1]
    here = scan.volume.array[round(x) + 1 : round(x) + 511, round(y) + 1 : round(y) + 511, round(z)]
    np.testing.assert_allclose(here, there, atol=0.02)


NINE = range(1, 10)
# Sum, largest and one value of the pixels that dcmtk's dcmdjpeg gives.
DCMDJPEG = (3767007, 264, 14)


def test_nine_encodings_of_one_mosaic_are_one_volume(archives: Path, read_scan: Read) -> None:
    first, *others = (read_scan(archives / "siemens" / "transfer_syntax" / f"{i}.dcm") for i in NINE)
    assert first.volume.shape == (64, 64, 35)
    assert first.volume.array.sum(dtype=np.float64) == 38036663  # of the whole picture: its 36th tile is empty
    np.testing.assert_allclose(first.volume.spacing, [3.25, 3.25, 3.6], atol=1e-6)
    assert first.source.notes == ("A Siemens mosaic: one image with 35 slices side by side.",)
    for other in others:
        np.testing.assert_array_equal(other.volume.array, first.volume.array)
        # Each encoder wrote the decimal strings of the place anew.
        np.testing.assert_allclose(other.volume.affine, first.volume.affine, atol=1e-9)


def test_several_mosaics_are_a_time_series(archives: Path, read_scan: Read) -> None:
    with pytest.raises(NotAVolume, match="9 Siemens mosaics, each a whole volume of 35 slices: a time series"):
        read_scan(archives / "siemens" / "transfer_syntax")


def test_enhanced_multi_frame(archives: Path, read_scan: Read) -> None:
    root = archives / "dicom2nifti" / "dicom2nifti"
    philips, hyperfine = (read_scan(root / name / "anatomical" / "001") for name in ("philips_enhanced", "hyperfine"))
    assert philips.volume.shape == (256, 256, 8)
    np.testing.assert_allclose(philips.volume.spacing, [1, 1, 1.2], atol=1e-4)
    assert hyperfine.volume.shape == (112, 138, 8)
    np.testing.assert_allclose(hyperfine.volume.spacing, [1.59, 1.61, 5])
    assert len(philips.source.instances) == 1


def test_compressed_series_agree(archives: Path, read_scan: Read) -> None:
    root = archives / "dicom2nifti" / "dicom2nifti" / "generic"
    rle, jpegls = (read_scan(root / name / "001").volume for name in ("compressed_rle", "compressed_jpegls"))
    np.testing.assert_array_equal(rle.array, jpegls.array)
    np.testing.assert_array_equal(rle.affine, jpegls.affine)


def test_one_slice_in_eight_encodings(archives: Path, read_scan: Read) -> None:
    names = ["", "_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_jpeg_ls_lossless", "_padded"]
    first, *others = (read_scan(archives / "pydicom" / "pydicom" / f"MR_small{name}.dcm") for name in names)
    assert first.volume.array.mean(dtype=np.float64) == pytest.approx(518.8806, abs=1e-3)
    for other in others:
        np.testing.assert_array_equal(other.volume.array, first.volume.array)


@pytest.mark.parametrize("name", ["JPEG-lossy", "JPGExtended"])
def test_twelve_bit_jpeg_as_dcmtk_decodes_it(archives: Path, name: str) -> None:
    with silence_libraries():
        path = archives / "pydicom" / "pydicom" / f"{name}.dcm"
        array, _ = read_frames([Frame(path, 0)], 1024, 256)
    assert (array.sum(dtype=np.float64), array.max(), array[128, 512, 0]) == DCMDJPEG


@pytest.mark.parametrize(("bits", "expected"), [(8, (25000, 255, 125)), (16, (6007250, 65535, 32765))])
def test_near_lossless_jpeg_ls_as_dcmtk_decodes_it(archives: Path, bits: int, expected: tuple[int, int, int]) -> None:
    """Sum, first and another pixel of what dcmtk's dcmdjpls gives."""
    path = archives / "pydicom" / "pydicom" / f"JPEGLSNearLossless_{bits:02d}.dcm"
    with silence_libraries():
        array, _ = read_frames([Frame(path, 0)], 45 if bits == 8 else 50, 10)
    assert (array.sum(dtype=np.float64), array[0, 0, 0], array[5, 5, 0]) == expected


@pytest.mark.parametrize(
    ("compressed", "plain"), [("pydicom/693_J2KI", "693_UNCI"), ("pydicom-data/693_J2KR", "693_UNCR")]
)
def test_a_ct_in_jpeg_2000_is_the_uncompressed_one(
    archives: Path, read_scan: Read, compressed: str, plain: str
) -> None:
    """With loss (J2KI) and without: signed, 14 bits, rescaled, padded."""
    one = read_scan(archives / "pydicom" / f"{compressed}.dcm")
    path = archives / "pydicom" / "pydicom-data" / f"{plain}.dcm"
    two, stored = read_scan(path), dcmread(path)
    np.testing.assert_array_equal(one.volume.array, two.volume.array)
    pixels = stored.pixel_array.astype(np.float64)
    values = pixels * float(stored.RescaleSlope) + float(stored.RescaleIntercept)
    padding = pixels == stored.PixelPaddingValue
    assert padding.sum() > 400
    np.testing.assert_array_equal(two.volume.array[:, :, 0].T[~padding], values[~padding])
    assert (two.volume.array[:, :, 0].T[padding] == values[~padding].min()).all()
    assert f"{padding.sum()} padding pixels were set to the smallest value of the image." in two.source.notes


def test_a_real_modality_look_up_table(archives: Path) -> None:
    """Sum, ends and first pixel; its file is a secondary capture, which no scan is."""
    with silence_libraries():
        array, _ = read_frames([Frame(archives / "pydicom" / "pydicom-data" / "mlut_18.dcm", 0)], 512, 512)
    found = (array.sum(dtype=np.float64), array.min(), array.max(), array[0, 0, 0])
    assert found == (8697190668, 0, 65535, 32759)


def test_an_enhanced_ct(archives: Path, read_scan: Read) -> None:
    scan = read_scan(archives / "pydicom" / "pydicom-data" / "eCT_Supplemental.dcm")
    assert (scan.source.modality, scan.volume.shape[:2]) == ("CT", (512, 512))
    assert scan.volume.array.min() == -1024


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("pydicom/MR_truncated.dcm", "truncated_file"),
        ("pydicom/no_meta.dcm", "not_an_image_format"),
        ("pydicom/no_meta_group_length.dcm", "truncated_file"),
        ("pydicom/JPEG2000.dcm", "wrong_modality"),
        ("pydicom-data/JLSL_RGB_ILV0.dcm", "wrong_modality"),
        ("pydicom-data/emri_small.dcm", "invalid_geometry"),
        ("pydicom-data/693_UNCR.dcm", "read"),
        ("pydicom-data/693_J2KR.dcm", "read"),
    ],
)
def test_single_files(archives: Path, tmp_path: Path, name: str, code: str) -> None:
    assert outcome(archives / "pydicom" / name, tmp_path) == code


def test_every_file_alone_is_read_or_refused(archives: Path, tmp_path: Path) -> None:
    files = [path for path in archives.rglob("*") if path.is_file()]
    files = [path for path in files if not path.is_relative_to(archives / "ge")][::8]
    assert len(files) > 20
    assert {outcome(path, tmp_path) for path in files} >= {"read", "not_an_image_format", "wrong_modality"}


@pytest.mark.parametrize("name", ["CT_pitch", "M2208_T2w", "MNI152_T1_2mm", "shear", "clinical_stroke_T2"])
def test_nifti_as_nibabel_reads_it(real_scans: Path, tmp_path: Path, name: str) -> None:
    path = real_scans / "nifti_misc" / f"{name}.nii.gz"
    scan, image = volume_file.read_volume_file(path, tmp_path, DEFAULT_LIMITS), nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    np.testing.assert_array_equal(scan.volume.array, image.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(scan.volume.affine, image.affine)
