"""Every way to store a grey value: transfer syntaxes, bits, signs, padding, look-up tables."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from pydicom import uid
from pydicom.dataset import FileDataset

from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.dicom import Series, datasets, save, scanned
from tests.support.encoded import made_picture, put_made, recode, stored

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


def slices_of(pictures: npt.NDArray[np.int64], bits: int, *, signed: bool) -> list[FileDataset]:
    """Slices of 2 mm, (N, rows, columns)."""
    slices = datasets(
        Volume(np.arange(4 * 4 * len(pictures), dtype=np.float32).reshape(4, 4, -1), np.diag([1.0, 1, 2, 1]))
    )
    for dataset, picture in zip(slices, pictures, strict=True):
        stored(dataset, picture, bits, signed=signed)
    return slices


def pictures(bits: int, *, signed: bool) -> npt.NDArray[np.int64]:
    """Both ends of the range, and numbers between, (3, 10, 12)."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    out = np.random.default_rng(bits).integers(low, high, (3, 10, 12), endpoint=True)
    out[0, 0, :2] = low, high
    return out


def read_back(folder: Path, read_scan: Read, slices: list[FileDataset]) -> npt.NDArray[np.float32]:
    save(folder / "s", slices)
    return read_scan(folder / "s").volume.array.transpose(2, 1, 0)  # (N, rows, columns)


# ---- transfer syntaxes -------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["MR", "CT"])  # unsigned and signed
@pytest.mark.parametrize("syntax", LOSSLESS_BY_GDCM, ids=lambda s: s.name)
def test_every_lossless_encoding_of_gdcm_gives_the_same_voxels(
    tmp_path: Path, read_scan: Read, volume: Volume, syntax: str, modality: str
) -> None:
    for path in save(tmp_path / "s", datasets(volume, Series(modality=modality))):  # type: ignore[arg-type]
        recode(path, syntax)
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, scanned(volume, "axial")[0])


@pytest.mark.parametrize("modality", ["MR", "CT"])
@pytest.mark.parametrize("syntax", BY_PYDICOM, ids=lambda s: s.name)
def test_every_encoding_of_pydicom_gives_the_same_voxels(
    tmp_path: Path, read_scan: Read, volume: Volume, syntax: str, modality: str
) -> None:
    save(tmp_path / "s", datasets(volume, Series(syntax=syntax, modality=modality)))  # type: ignore[arg-type]
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, scanned(volume, "axial")[0])


def smooth(bits: int) -> npt.NDArray[np.int64]:
    """What a lossy encoder keeps nearly, (1, 40, 48)."""
    row, column = np.indices((40, 48))
    wave = np.sin(row / 9) * np.cos(column / 8) / 2 + 0.5
    return np.asarray(np.round(wave * (2**bits - 1)), dtype=np.int64)[None]


def test_baseline_jpeg_is_near(tmp_path: Path, read_scan: Read) -> None:
    (path,) = save(tmp_path / "s", slices_of(smooth(8), 8, signed=False))
    recode(path, uid.JPEGBaseline8Bit)
    found = read_scan(path).volume.array.transpose(2, 1, 0)
    assert 0 < np.abs(found - smooth(8)).max() <= 1


def test_twelve_bit_jpeg_is_near(tmp_path: Path, read_scan: Read) -> None:
    (dataset,) = slices_of(smooth(8), 8, signed=False)
    put_made(dataset, "u12-extended", uid.JPEGExtended12Bit)
    found = read_back(tmp_path, read_scan, [dataset])[0]
    assert np.abs(found - made_picture("u12")).max() == 3  # of 4095, as dcmtk decodes it


def test_lossy_jpeg_ls_is_near(tmp_path: Path, read_scan: Read) -> None:
    (dataset,) = slices_of(smooth(12), 12, signed=False)
    dataset.compress(uid.JPEGLSNearLossless, generate_instance_uid=False, jls_error=3)
    found = read_back(tmp_path, read_scan, [dataset])
    assert 0 < np.abs(found - smooth(12)).max() <= 3


def test_lossy_jpeg_2000_is_near(tmp_path: Path, read_scan: Read) -> None:
    (dataset,) = slices_of(smooth(12), 12, signed=False)
    dataset.compress(uid.JPEG2000, generate_instance_uid=False, j2k_psnr=[60])
    found = read_back(tmp_path, read_scan, [dataset])
    error = found - smooth(12)
    # 60 dB of 4095 are an error of 4.1 root mean square; 4.6 and at most 48 were measured.
    assert 0 < np.sqrt(np.mean(error**2)) < 5
    assert np.abs(error).max() <= 50


@pytest.mark.parametrize("name", ["u8", "u12", "u16", "s16"])
@pytest.mark.parametrize("syntax", [uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL], ids=lambda s: s.name)
def test_high_throughput_jpeg_2000(tmp_path: Path, read_scan: Read, syntax: str, name: str) -> None:
    (dataset,) = slices_of(smooth(8), 8, signed=False)
    put_made(dataset, name, syntax)
    np.testing.assert_array_equal(read_back(tmp_path, read_scan, [dataset])[0], made_picture(name))


def test_high_throughput_jpeg_2000_with_loss(tmp_path: Path, read_scan: Read) -> None:
    (dataset,) = slices_of(smooth(8), 8, signed=False)
    put_made(dataset, "u12-lossy", uid.HTJ2K)
    found = read_back(tmp_path, read_scan, [dataset])[0]
    assert np.abs(found - made_picture("u12")).max() == 9  # of 4095: what its encoder left


# ---- what a stored number means ----------------------------------------------------------------

BITS = [(8, False), (8, True), (10, False), (12, False), (12, True), (16, False), (16, True)]


@pytest.mark.parametrize(("bits", "signed"), BITS)
def test_bits_and_signs(tmp_path: Path, read_scan: Read, bits: int, *, signed: bool) -> None:
    expected = pictures(bits, signed=signed)
    found = read_back(tmp_path, read_scan, slices_of(expected, bits, signed=signed))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("bits", "signed"), [(12, False), (12, True)])
def test_bits_that_are_not_used_are_not_read(tmp_path: Path, read_scan: Read, bits: int, *, signed: bool) -> None:
    """Old scanners keep an overlay in the four bits above the picture."""
    expected = pictures(bits, signed=signed)
    slices = slices_of(expected, bits, signed=signed)
    for dataset in slices:
        words = np.frombuffer(dataset.PixelData, "<u2").copy() & 0x0FFF
        words[::3] |= 0x5000
        dataset.PixelData = words.tobytes()
    np.testing.assert_array_equal(read_back(tmp_path, read_scan, slices), expected)


@pytest.mark.parametrize(("bits", "signed"), BITS)
def test_an_inverted_grey_scale_is_turned_over_within_its_range(
    tmp_path: Path, read_scan: Read, bits: int, *, signed: bool
) -> None:
    expected = pictures(bits, signed=signed)
    slices = slices_of((-1 if signed else 2**bits - 1) - expected, bits, signed=signed)
    for dataset in slices:
        dataset.PhotometricInterpretation = "MONOCHROME1"
    np.testing.assert_array_equal(read_back(tmp_path, read_scan, slices), expected)


def test_an_inverted_ct_keeps_its_hounsfield_units(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = datasets(volume, Series(modality="CT"))
    for dataset in slices:
        dataset.PhotometricInterpretation = "MONOCHROME1"
    save(tmp_path / "s", slices)
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, scanned(volume, "axial")[0])


def test_a_range_of_padding(tmp_path: Path, read_scan: Read) -> None:
    expected = pictures(12, signed=True)
    expected[1, 3, 4:7] = -2000, -1999, -1990
    slices = slices_of(expected, 12, signed=True)
    for dataset in slices:
        dataset.add_new("PixelPaddingValue", "SS", -2048)
        dataset.add_new("PixelPaddingRangeLimit", "SS", -1990)
    found = read_back(tmp_path, read_scan, slices)
    image = expected[expected > -1990]
    np.testing.assert_array_equal(found, np.where(expected <= -1990, image.min(), expected))


def test_each_slice_has_its_own_rescale(tmp_path: Path, read_scan: Read) -> None:
    numbers = pictures(12, signed=False)
    slices = slices_of(numbers, 12, signed=False)
    for k, dataset in enumerate(slices):
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5 * (k + 1), -100 * k
    expected = numbers * np.array([0.5, 1, 1.5])[:, None, None] - np.array([0, 100, 200])[:, None, None]
    np.testing.assert_allclose(read_back(tmp_path, read_scan, slices), expected, rtol=1e-6)


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
def test_character_sets(tmp_path: Path, read_scan: Read, volume: Volume, charset: str, text: str) -> None:
    slices = datasets(volume)
    for dataset in slices:
        dataset.SpecificCharacterSet = charset.split("\\") if "\\" in charset else charset
        dataset.PatientName = dataset.SeriesDescription = text
    save(tmp_path / "s", slices)
    assert read_scan(tmp_path / "s").source.sequences == ("T1",)


def test_an_unknown_character_set_is_no_reason_to_refuse(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = datasets(volume)
    for dataset in slices:
        dataset.SpecificCharacterSet = "ISO_IR 100"
    paths = save(tmp_path / "s", slices)
    for path in paths:  # bytes that no set allows
        content = path.read_bytes().replace(b"ISO_IR 100", b"ISO_IR 999")
        path.write_bytes(content.replace(b"T1w MPRAGE", b"T1w \xff\xfe\x80AGE"))
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, scanned(volume, "axial")[0])
