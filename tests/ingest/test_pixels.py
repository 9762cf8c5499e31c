"""Stored pixels: transfer syntaxes, bits, signs, padding, rescale, look-up tables and character sets."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset

from app.errors import InvalidHeader
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.dicom import Series, make_datasets, reorient, save
from tests.support.encoded import recode, reference_picture, set_encoded_file, store_pixels

BY_PYDICOM = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
)
LOSSLESS_BY_GDCM = (
    uid.ExplicitVRBigEndian,
    uid.RLELossless,
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
)


def make_slices(pictures: npt.NDArray[np.int64], bits: int, *, signed: bool) -> list[FileDataset]:
    """Return slices of 2 mm from pictures, (N, rows, columns)."""
    slices = make_datasets(
        Volume(np.arange(4 * 4 * len(pictures), dtype=np.float32).reshape(4, 4, -1), np.diag([1.0, 1, 2, 1]))
    )
    for dataset, picture in zip(slices, pictures, strict=True):
        store_pixels(dataset, picture, bits, signed=signed)
    return slices


def random_pictures(bits: int, *, signed: bool) -> npt.NDArray[np.int64]:
    """Return random numbers that include both ends of the range, (3, 10, 12)."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    out = np.random.default_rng(bits).integers(low, high, (3, 10, 12), endpoint=True)
    out[0, 0, :2] = low, high
    return out


def save_and_read(folder: Path, read_scan: Read, slices: list[FileDataset]) -> npt.NDArray[np.float32]:
    save(folder / "s", slices)
    return read_scan(folder / "s").volume.array.transpose(2, 1, 0)  # (N, rows, columns)


# ---- transfer syntaxes -------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["MR", "CT"])  # unsigned and signed
@pytest.mark.parametrize("syntax", LOSSLESS_BY_GDCM, ids=lambda s: s.name)
def test_every_lossless_syntax_of_gdcm_gives_the_same_voxels(
    tmp_path: Path, read_scan: Read, volume: Volume, syntax: str, modality: str
) -> None:
    for path in save(tmp_path / "s", make_datasets(volume, Series(modality=modality))):  # type: ignore[arg-type]
        recode(path, syntax)
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, reorient(volume, "axial")[0])


@pytest.mark.parametrize("modality", ["MR", "CT"])
@pytest.mark.parametrize("syntax", BY_PYDICOM, ids=lambda s: s.name)
def test_every_syntax_of_pydicom_gives_the_same_voxels(
    tmp_path: Path, read_scan: Read, volume: Volume, syntax: str, modality: str
) -> None:
    save(tmp_path / "s", make_datasets(volume, Series(syntax=syntax, modality=modality)))  # type: ignore[arg-type]
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, reorient(volume, "axial")[0])


def smooth_picture(bits: int) -> npt.NDArray[np.int64]:
    """Return a picture that a lossy encoder changes little, (1, 40, 48)."""
    row, column = np.indices((40, 48))
    wave = np.sin(row / 9) * np.cos(column / 8) / 2 + 0.5
    return np.asarray(np.round(wave * (2**bits - 1)), dtype=np.int64)[None]


def test_baseline_jpeg_has_a_small_error(tmp_path: Path, read_scan: Read) -> None:
    (path,) = save(tmp_path / "s", make_slices(smooth_picture(8), 8, signed=False))
    recode(path, uid.JPEGBaseline8Bit)
    found = read_scan(path).volume.array.transpose(2, 1, 0)
    assert 0 < np.abs(found - smooth_picture(8)).max() <= 1


def test_twelve_bit_jpeg_has_a_small_error(tmp_path: Path, read_scan: Read) -> None:
    (dataset,) = make_slices(smooth_picture(8), 8, signed=False)
    set_encoded_file(dataset, "u12-extended", uid.JPEGExtended12Bit)
    found = save_and_read(tmp_path, read_scan, [dataset])[0]
    assert np.abs(found - reference_picture("u12")).max() == 3  # of 4095, equal to dcmtk's


def test_lossy_jpeg_ls_has_a_small_error(tmp_path: Path, read_scan: Read) -> None:
    (dataset,) = make_slices(smooth_picture(12), 12, signed=False)
    dataset.compress(uid.JPEGLSNearLossless, generate_instance_uid=False, jls_error=3)
    found = save_and_read(tmp_path, read_scan, [dataset])
    assert 0 < np.abs(found - smooth_picture(12)).max() <= 3


def test_lossy_jpeg_2000_has_a_small_error(tmp_path: Path, read_scan: Read) -> None:
    (dataset,) = make_slices(smooth_picture(12), 12, signed=False)
    dataset.compress(uid.JPEG2000, generate_instance_uid=False, j2k_psnr=[60])
    found = save_and_read(tmp_path, read_scan, [dataset])
    error = found - smooth_picture(12)
    # 60 dB of 4095 is a root mean square error of 4.1. Measured: 4.6, and a largest error of 48.
    assert 0 < np.sqrt(np.mean(error**2)) < 5
    assert np.abs(error).max() <= 50


@pytest.mark.parametrize("name", ["u8", "u12", "u16", "s16"])
@pytest.mark.parametrize("syntax", [uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL], ids=lambda s: s.name)
def test_high_throughput_jpeg_2000_gives_the_same_voxels(
    tmp_path: Path, read_scan: Read, syntax: str, name: str
) -> None:
    (dataset,) = make_slices(smooth_picture(8), 8, signed=False)
    set_encoded_file(dataset, name, syntax)
    np.testing.assert_array_equal(save_and_read(tmp_path, read_scan, [dataset])[0], reference_picture(name))


def test_lossy_high_throughput_jpeg_2000_has_a_small_error(tmp_path: Path, read_scan: Read) -> None:
    (dataset,) = make_slices(smooth_picture(8), 8, signed=False)
    set_encoded_file(dataset, "u12-lossy", uid.HTJ2K)
    found = save_and_read(tmp_path, read_scan, [dataset])[0]
    assert np.abs(found - reference_picture("u12")).max() == 9  # of 4095


# ---- stored values -----------------------------------------------------------------------------

BITS = [(8, False), (8, True), (10, False), (12, False), (12, True), (16, False), (16, True)]


@pytest.mark.parametrize(("bits", "signed"), BITS)
def test_bits_and_signs_are_read(tmp_path: Path, read_scan: Read, bits: int, *, signed: bool) -> None:
    expected = random_pictures(bits, signed=signed)
    found = save_and_read(tmp_path, read_scan, make_slices(expected, bits, signed=signed))
    np.testing.assert_array_equal(found, expected)


def test_images_that_disagree_about_the_sign_of_large_values_are_refused(tmp_path: Path, read_scan: Read) -> None:
    slices = make_slices(random_pictures(16, signed=False), 16, signed=False)
    slices[1].PixelRepresentation = 1
    with pytest.raises(InvalidHeader, match="PixelRepresentation"):
        save_and_read(tmp_path, read_scan, slices)


def test_images_may_differ_in_sign_if_no_value_contradicts(tmp_path: Path, read_scan: Read) -> None:
    expected = random_pictures(12, signed=False)
    slices = make_slices(expected, 16, signed=False)
    slices[1].PixelRepresentation = 1
    np.testing.assert_array_equal(save_and_read(tmp_path, read_scan, slices), expected)


@pytest.mark.parametrize(("bits", "signed"), [(12, False), (12, True)])
def test_unused_bits_are_ignored(tmp_path: Path, read_scan: Read, bits: int, *, signed: bool) -> None:
    """Old scanners store an overlay in the four bits above the pixel value."""
    expected = random_pictures(bits, signed=signed)
    slices = make_slices(expected, bits, signed=signed)
    for dataset in slices:
        words = np.frombuffer(dataset.PixelData, "<u2").copy() & 0x0FFF
        words[::3] |= 0x5000
        dataset.PixelData = words.tobytes()
    np.testing.assert_array_equal(save_and_read(tmp_path, read_scan, slices), expected)


@pytest.mark.parametrize(("bits", "signed"), BITS)
def test_an_inverted_grey_scale_is_inverted_back(tmp_path: Path, read_scan: Read, bits: int, *, signed: bool) -> None:
    expected = random_pictures(bits, signed=signed)
    slices = make_slices((-1 if signed else 2**bits - 1) - expected, bits, signed=signed)
    for dataset in slices:
        dataset.PhotometricInterpretation = "MONOCHROME1"
    save(tmp_path / "s", slices)
    scan = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(scan.volume.array.transpose(2, 1, 0), expected)
    assert "MONOCHROME1" in scan.source.notes[-1]


def test_an_inverted_ct_keeps_its_hounsfield_units(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume, Series(modality="CT"))
    for dataset in slices:
        dataset.PhotometricInterpretation = "MONOCHROME1"
    save(tmp_path / "s", slices)
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, reorient(volume, "axial")[0])


def test_a_padding_range_becomes_background(tmp_path: Path, read_scan: Read) -> None:
    expected = random_pictures(12, signed=True)
    expected[1, 3, 4:7] = -2000, -1999, -1990
    slices = make_slices(expected, 12, signed=True)
    for dataset in slices:
        dataset.add_new("PixelPaddingValue", "SS", -2048)
        dataset.add_new("PixelPaddingRangeLimit", "SS", -1990)
    found = save_and_read(tmp_path, read_scan, slices)
    image = expected[expected > -1990]
    np.testing.assert_array_equal(found, np.where(expected <= -1990, image.min(), expected))


@pytest.mark.parametrize("value", [-2000, 2**16 - 2000])  # signed, and its bits written as an unsigned value
def test_a_padding_value_becomes_background(tmp_path: Path, read_scan: Read, volume: Volume, value: int) -> None:
    slices = make_datasets(volume, Series(modality="CT"))
    for dataset in slices:
        pixels = dataset.pixel_array.copy()
        pixels[:5, :] = -2000
        dataset.PixelData = pixels.tobytes()
        dataset.add_new("PixelPaddingValue", "US" if value > 0 else "SS", value)
    save(tmp_path / "s", slices)
    scan = read_scan(tmp_path / "s")
    expected = reorient(volume, "axial")[0].copy()
    expected[:, :5] = expected[:, 5:].min()
    np.testing.assert_array_equal(scan.volume.array, expected)
    assert scan.source.notes[0].startswith(f"{32 * 5 * 14} padding pixels")


def test_a_modality_look_up_table_is_applied(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    table = (np.arange(4096) ** 2 % 60_000).astype(np.uint16)
    slices = make_datasets(volume)
    for dataset in slices:
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [4096, 0, 16])
        item.ModalityLUTType = "US"
        item.add_new("LUTData", "US", table.tolist())
        dataset.ModalityLUTSequence = [item]
    save(tmp_path / "s", slices)
    expected = table[reorient(volume, "axial")[0].astype(int)]
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, expected)


def test_each_slice_has_its_own_rescale(tmp_path: Path, read_scan: Read) -> None:
    numbers = random_pictures(12, signed=False)
    slices = make_slices(numbers, 12, signed=False)
    for k, dataset in enumerate(slices):
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5 * (k + 1), -100 * k
    expected = numbers * np.array([0.5, 1, 1.5])[:, None, None] - np.array([0, 100, 200])[:, None, None]
    np.testing.assert_allclose(save_and_read(tmp_path, read_scan, slices), expected, rtol=1e-6)


# ---- character sets ----------------------------------------------------------------------------

CHARACTER_SETS = {
    "": "Head T1",
    "ISO_IR 100": "Tête T1 Übersicht",
    "ISO_IR 144": "Голова T1",
    "ISO_IR 192": "头部 T1 Tête",
    "GB18030": "头部 T1",
    "\\ISO 2022 IR 87": "頭部 T1",
}


@pytest.mark.parametrize(("charset", "text"), CHARACTER_SETS.items())
def test_names_in_every_character_set_are_searched(
    tmp_path: Path, read_scan: Read, volume: Volume, charset: str, text: str
) -> None:
    slices = make_datasets(volume)
    for dataset in slices:
        dataset.SpecificCharacterSet = charset.split("\\") if "\\" in charset else charset
        dataset.PatientName = dataset.SeriesDescription = text
    save(tmp_path / "s", slices)
    assert read_scan(tmp_path / "s").source.sequences == ("T1",)


def test_an_unknown_character_set_is_accepted(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume)
    for dataset in slices:
        dataset.SpecificCharacterSet = "ISO_IR 100"
    paths = save(tmp_path / "s", slices)
    for path in paths:  # bytes that no character set allows
        content = path.read_bytes().replace(b"ISO_IR 100", b"ISO_IR 999")
        path.write_bytes(content.replace(b"T1w MPRAGE", b"T1w \xff\xfe\x80AGE"))
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, reorient(volume, "axial")[0])
