import contextlib
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import (
    ConstantVoxels,
    CounterpartError,
    InvalidGeometry,
    InvalidHeader,
    InvalidVoxels,
    NotAnImageFormat,
    NotAVolume,
    TooManyVoxels,
    TruncatedFile,
    UnsupportedPixels,
)
from app.ingest.reader import Limits
from app.ingest import volume_file
from app.volume import Volume
from tests.ingest.conftest import Read, placed

Pack = Callable[[bytes], bytes]
OBLIQUE = (0.2, -0.35, 0.5)


def save(path: Path, array: np.ndarray[Any, Any], affine: Any, **header: object) -> Path:
    """Write under a name that says nothing; header fields as keywords."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    fields = nib.Nifti1Header(content[:348], check=False)
    for name, value in header.items():  # nibabel would put them right
        fields[name] = value
    path.write_bytes(fields.binaryblock + content[348:])
    return path


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 8)] * 3),
    shear=st.floats(-0.3, 0.3),
    shape=st.tuples(*[st.integers(1, 7)] * 3).filter(lambda s: np.prod(s) > 1),
    kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
)
def test_any_affine_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    angles: tuple[float, float, float],
    spacing: tuple[float, float, float],
    shear: float,
    shape: tuple[int, int, int],
    kind: type[nib.Nifti1Image],
) -> None:
    folder = tmp_path_factory.mktemp("any")
    affine = placed(spacing, angles)
    affine[:3, 2] += shear * affine[:3, 0]
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    image = kind(array, None)
    image.set_sform(affine, code=1)
    (folder / "scan").write_bytes(image.to_bytes())
    scan = volume_file.read_volume_file(folder / "scan", folder, Limits())
    np.testing.assert_array_equal(scan.volume.array, array)
    np.testing.assert_allclose(scan.volume.affine, affine, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", ">i2", ">f4"])
def test_every_number_type_and_byte_order(tmp_path: Path, read_scan: Read, dtype: str) -> None:
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    header = nib.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    image = nib.Nifti1Image(array, np.eye(4), header, dtype=np.dtype(dtype))
    (tmp_path / "scan").write_bytes(image.to_bytes())
    np.testing.assert_array_equal(read_scan(tmp_path / "scan").volume.array, array)


def test_scaling_is_applied(tmp_path: Path, read_scan: Read) -> None:
    path = save(tmp_path / "scan", np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([0.5, -10], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(content)
    np.testing.assert_array_equal(read_scan(path).volume.array, np.arange(60).reshape(3, 4, 5) * 0.5 - 10)


def test_gzipped_is_the_same_scan(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    plain = save(tmp_path / "a", volume.array, volume.affine)
    (tmp_path / "b.txt").write_bytes(gzip.compress(plain.read_bytes()))
    one, two = read_scan(plain), read_scan(tmp_path / "b.txt")
    np.testing.assert_array_equal(one.volume.array, two.volume.array)
    np.testing.assert_array_equal(one.volume.affine, two.volume.affine)
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 4, 5, 1), (3, 4, 5)), ((3, 4, 5, 1, 1), (3, 4, 5)), ((3, 4), (3, 4, 1)), ((3, 1, 5), (3, 1, 5))],
)
def test_axes_of_length_one(tmp_path: Path, read_scan: Read, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    assert read_scan(save(tmp_path / "scan", array, np.eye(4))).volume.shape == expected


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4, 5, 2), np.int16),
        np.zeros((3, 4, 5, 1, 3), np.int16),
        np.zeros(12, np.int16),
        np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")]),
        np.zeros((3, 4, 5), np.complex64),
    ],
    ids=["time series", "vectors", "a line", "colour", "complex"],
)
def test_what_is_no_grey_volume(tmp_path: Path, read_scan: Read, array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(NotAVolume):
        read_scan(save(tmp_path / "scan", array, np.eye(4)))


@pytest.mark.parametrize(("value", "error"), [(np.nan, InvalidVoxels), (np.inf, InvalidVoxels), (1, ConstantVoxels)])
def test_voxels_that_say_nothing(tmp_path: Path, read_scan: Read, value: float, error: type[CounterpartError]) -> None:
    array = np.ones((3, 4, 5), np.float32)
    array[1, 2, 3] = value
    with pytest.raises(error):
        read_scan(save(tmp_path / "scan", array, np.eye(4)))


def test_no_position_is_said(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    scan = read_scan(save(tmp_path / "scan", volume.array, volume.affine, sform_code=0, qform_code=0))
    assert scan.source.sform_code == 0
    assert "no position in space" in scan.source.notes[0]


def test_qform_alone_is_used(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    affine = placed((0.9, 1.1, 2.0), OBLIQUE)
    image = nib.Nifti1Image(volume.array, None)
    image.set_qform(affine, code=3)
    image.header.set_xyzt_units("mm")
    (tmp_path / "scan").write_bytes(image.to_bytes())
    scan = read_scan(tmp_path / "scan")
    np.testing.assert_allclose(scan.volume.affine, affine, atol=1e-5)
    assert (scan.source.sform_code, scan.source.notes) == (3, ())


def test_sform_and_qform_that_disagree(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    image = nib.Nifti1Image(volume.array, volume.affine)
    moved = volume.affine.copy()
    moved[0, 3] += 12.5
    image.set_qform(moved, code=1)
    image.header.set_xyzt_units("mm")
    (tmp_path / "scan").write_bytes(image.to_bytes())
    scan = read_scan(tmp_path / "scan")
    np.testing.assert_allclose(scan.volume.affine, volume.affine, atol=1e-5)
    assert scan.source.notes == ("The file's sform and qform disagree by up to 12.5 mm: the sform was taken.",)


@pytest.mark.parametrize(("unit", "scale"), [(1, 1000.0), (3, 0.001), (0, 1.0), (7, 1.0)])
def test_units_of_length(tmp_path: Path, read_scan: Read, unit: int, scale: float) -> None:
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    affine = np.diag([2 / scale, 2 / scale, 3 / scale, 1])
    scan = read_scan(save(tmp_path / "scan", array, affine, xyzt_units=unit))
    np.testing.assert_allclose(scan.volume.spacing, [2, 2, 3], rtol=1e-6)
    assert len(scan.source.notes) == 1


@pytest.mark.parametrize("keep", [100, 351, 400, -1])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_cut_short(tmp_path: Path, read_scan: Read, volume: Volume, keep: int, pack: Pack) -> None:
    content = save(tmp_path / "scan", volume.array, volume.affine).read_bytes()[:keep]
    (tmp_path / "scan").write_bytes(pack(bytes(content)))
    with pytest.raises(TruncatedFile):
        read_scan(tmp_path / "scan")


@pytest.mark.parametrize("keep", [12, 20, 5000, -4])
def test_a_gzip_stream_cut_short(tmp_path: Path, read_scan: Read, volume: Volume, keep: int) -> None:
    content = gzip.compress(save(tmp_path / "scan", volume.array, volume.affine).read_bytes())
    (tmp_path / "scan").write_bytes(content[:keep])
    with pytest.raises(TruncatedFile):
        read_scan(tmp_path / "scan")


def test_a_gzip_stream_that_is_damaged(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    content = bytearray(gzip.compress(save(tmp_path / "scan", volume.array, volume.affine).read_bytes()))
    content[-8] ^= 0xFF  # its checksum
    (tmp_path / "scan").write_bytes(content)
    with pytest.raises(TruncatedFile):
        read_scan(tmp_path / "scan")


@pytest.mark.parametrize("inside", [b"a text about a scan\n" * 50, b"", b"\0" * 128 + b"DICM"])
def test_something_else_in_gzip(tmp_path: Path, read_scan: Read, inside: bytes) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(inside))
    with pytest.raises(NotAnImageFormat):
        read_scan(tmp_path / "scan.nii.gz")


def test_a_gzip_bomb_is_not_inflated(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    content = save(tmp_path / "scan", volume.array, volume.affine).read_bytes()
    (tmp_path / "scan").write_bytes(gzip.compress(content + bytes(16_000_000)))
    # What follows the announced voxels is never looked at.
    np.testing.assert_array_equal(read_scan(tmp_path / "scan").volume.array, volume.array)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_header_that_announces_the_moon(tmp_path: Path, read_scan: Read, pack: Pack) -> None:
    path = save(tmp_path / "scan", np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([32767] * 3, "<i2").tobytes()
    path.write_bytes(pack(bytes(content)))
    with pytest.raises(TooManyVoxels, match="35181150961663 voxels"):
        read_scan(path)


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (42, np.array([-3], "<i2"), (NotAVolume, InvalidHeader)),
        (40, np.array([9], "<i2"), (NotAVolume, InvalidHeader)),
        (70, np.array([4242], "<i2"), (InvalidHeader,)),
        (70, np.array([1536], "<i2"), (InvalidHeader, UnsupportedPixels)),  # float128, which no processor has
        (108, np.array([np.nan], "<f4"), (InvalidHeader,)),
        (108, np.array([1e30], "<f4"), (InvalidHeader, TooManyVoxels)),
        (112, np.array([2, np.nan], "<f4"), (InvalidHeader,)),
        (280, np.array([np.nan], "<f4"), (InvalidGeometry,)),
        (280, np.zeros(12, "<f4"), (InvalidGeometry,)),
    ],
)
def test_a_header_that_contradicts_itself(
    tmp_path: Path, read_scan: Read, at: int, value: np.ndarray[Any, Any], error: tuple[type[CounterpartError], ...]
) -> None:
    path = save(tmp_path / "scan", np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    content = bytearray(path.read_bytes())
    content[at : at + value.nbytes] = value.tobytes()
    path.write_bytes(content)
    with pytest.raises(error):
        read_scan(path)


def test_headers_of_random_bytes_end_in_an_error_of_ours(tmp_path: Path, read_scan: Read) -> None:
    content = save(tmp_path / "scan", np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)).read_bytes()
    rng = np.random.default_rng(3)
    for _ in range(60):
        broken = bytearray(content)
        for at in rng.integers(4, 344, rng.integers(1, 30)):
            broken[at] = rng.integers(256)
        (tmp_path / "scan").write_bytes(broken)
        with contextlib.suppress(CounterpartError):  # some survive: nothing that matters was hit
            read_scan(tmp_path / "scan")


def test_limits_let_a_large_ct_pass() -> None:
    limits = Limits()
    assert limits.max_voxels >= 512 * 512 * 600
    assert limits.max_inflated_bytes >= 4 * 512 * 512 * 600


@pytest.mark.parametrize(("air", "share", "expected"), [(-1000, 0.5, True), (-1024, 0.03, True), (-1000, 0.01, False)])
def test_hounsfield_units_are_known_by_their_air(
    tmp_path: Path,
    read_scan: Read,
    air: int,
    share: float,
    expected: bool,  # noqa: FBT001
) -> None:
    array = np.random.default_rng(0).integers(-150, 1500, (20, 20, 20)).astype(np.int16)
    array.reshape(-1)[: int(share * array.size)] = air
    assert read_scan(save(tmp_path / "s.nii.gz", array, np.eye(4))).source.hounsfield is expected
    assert not read_scan(save(tmp_path / "m.nii.gz", np.maximum(array, 0), np.eye(4))).source.hounsfield


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_what_an_extension_holds_is_not_looked_at(kind: type[nib.Nifti1Image], tmp_path: Path) -> None:
    """One that calls itself DICOM and is none was refused where pydicom is installed, and told of nothing."""
    array = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
    image = kind(array, np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"abcd\xff\xfe\xfd\xfc"))
    content = bytearray(image.to_bytes())
    code = image.header.sizeof_hdr + 8  # behind the flag and the extension's size
    assert content[code : code + 4] == b"\x06\0\0\0"
    content[code] = 2  # DICOM
    (tmp_path / "scan.nii").write_bytes(content)
    scan = volume_file.read_volume_file(tmp_path / "scan.nii", tmp_path, Limits())
    np.testing.assert_array_equal(scan.volume.array, array)
