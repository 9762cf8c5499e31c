"""NIfTI files: number types, geometry, units and invalid headers."""

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
    NotAVolume,
    TooManyVoxels,
    UnsupportedPixels,
)
from app.ingest import reader, volume_file
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.geometry import OBLIQUE, SPACING, make_affine

INTEGERS = np.arange(60, dtype=np.int16).reshape(3, 4, 5)


def save(path: Path, array: np.ndarray[Any, Any], affine: Any, **header: object) -> Path:
    """Write a NIfTI-1 file; header fields are keywords."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    fields = nib.Nifti1Header(content[:348], check=False)
    for name, value in header.items():  # after to_bytes, because nibabel would correct them
        fields[name] = value
    path.write_bytes(fields.binaryblock + content[348:])
    return path


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 8)] * 3),
    shear=st.floats(-0.3, 0.3),
    shape=st.tuples(*[st.integers(1, 7)] * 3).filter(lambda s: np.prod(s) > 1),
    image_class=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
)
def test_any_affine_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    angles: tuple[float, float, float],
    spacing: tuple[float, float, float],
    shear: float,
    shape: tuple[int, int, int],
    image_class: type[nib.Nifti1Image],
) -> None:
    folder = tmp_path_factory.mktemp("any")
    affine = make_affine(spacing, angles)
    affine[:3, 2] += shear * affine[:3, 0]
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    image = image_class(array, None)
    image.set_sform(affine, code=1)
    (folder / "scan").write_bytes(image.to_bytes())
    scan = reader.read_scan(folder / "scan", scratch=folder)
    np.testing.assert_array_equal(scan.volume.array, array)
    np.testing.assert_allclose(scan.volume.affine, affine, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", ">i2", ">f4"])
def test_every_number_type_and_byte_order_is_read(tmp_path: Path, read_scan: Read, dtype: str) -> None:
    array = INTEGERS.astype(dtype)
    header = nib.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    image = nib.Nifti1Image(array, np.eye(4), header, dtype=np.dtype(dtype))
    (tmp_path / "scan").write_bytes(image.to_bytes())
    np.testing.assert_array_equal(read_scan(tmp_path / "scan").volume.array, array)


def test_scaling_is_applied(tmp_path: Path, read_scan: Read) -> None:
    path = save(tmp_path / "scan", INTEGERS, np.eye(4), scl_slope=0.5, scl_inter=-10)
    np.testing.assert_array_equal(read_scan(path).volume.array, INTEGERS * 0.5 - 10)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 4, 5, 1), (3, 4, 5)), ((3, 4, 5, 1, 1), (3, 4, 5)), ((3, 4), (3, 4, 1)), ((3, 1, 5), (3, 1, 5))],
)
def test_axes_of_length_one_are_accepted(
    tmp_path: Path, read_scan: Read, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
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
    ids=["time series", "vectors", "one axis", "colour", "complex"],
)
def test_other_than_one_grey_volume_is_refused(tmp_path: Path, read_scan: Read, array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(NotAVolume):
        read_scan(save(tmp_path / "scan", array, np.eye(4)))


@pytest.mark.parametrize(("value", "error"), [(np.nan, InvalidVoxels), (np.inf, InvalidVoxels), (1, ConstantVoxels)])
def test_invalid_voxels_are_refused(
    tmp_path: Path, read_scan: Read, value: float, error: type[CounterpartError]
) -> None:
    array = np.ones((3, 4, 5), np.float32)
    array[1, 2, 3] = value
    with pytest.raises(error):
        read_scan(save(tmp_path / "scan", array, np.eye(4)))


def test_a_missing_position_is_noted(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    scan = read_scan(save(tmp_path / "scan", volume.array, volume.affine, sform_code=0, qform_code=0))
    assert scan.source.sform_code == 0
    assert len(scan.source.notes) == 1


def test_the_qform_is_used_without_a_sform(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    affine = make_affine(SPACING, OBLIQUE)
    image = nib.Nifti1Image(volume.array, None)
    image.set_qform(affine, code=3)
    image.header.set_xyzt_units("mm")
    (tmp_path / "scan").write_bytes(image.to_bytes())
    scan = read_scan(tmp_path / "scan")
    np.testing.assert_allclose(scan.volume.affine, affine, atol=1e-5)
    assert (scan.source.sform_code, scan.source.notes) == (3, ())


def test_a_sform_that_differs_from_the_qform_is_used_and_noted(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    image = nib.Nifti1Image(volume.array, volume.affine)
    moved = volume.affine.copy()
    moved[0, 3] += 12.5
    image.set_qform(moved, code=1)
    image.header.set_xyzt_units("mm")
    (tmp_path / "scan").write_bytes(image.to_bytes())
    scan = read_scan(tmp_path / "scan")
    np.testing.assert_allclose(scan.volume.affine, volume.affine, atol=1e-5)
    (note,) = scan.source.notes
    assert "12.5 mm" in note


def test_voxel_sizes_that_contradict_the_sform_are_noted(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    pixdim = np.array([1, 1, 1.5, 4, 1, 1, 1, 1], np.float32)
    scan = read_scan(save(tmp_path / "scan", volume.array, volume.affine, pixdim=pixdim, qform_code=0))
    np.testing.assert_allclose(scan.volume.affine, volume.affine, atol=1e-5)
    (note,) = scan.source.notes
    assert "voxels of 1 x 1.5 x 4 mm (pixdim)" in note


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_bytes_behind_the_voxels_are_warned_of(
    tmp_path: Path, read_scan: Read, volume: Volume, pack: Callable[[bytes], bytes]
) -> None:
    half = np.array([3, 32, 34, 7, 1, 1, 1, 1], np.int16)
    path = save(tmp_path / "scan", volume.array, volume.affine, dim=half)
    path.write_bytes(pack(path.read_bytes()))
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.volume.array, volume.array[:, :, :7])
    (warning,) = scan.source.warnings
    assert warning.startswith(f"More data follows the {352 + 32 * 34 * 7 * 4} bytes that the header")
    path = save(tmp_path / "whole", volume.array, volume.affine)
    path.write_bytes(pack(path.read_bytes()))
    assert read_scan(path).source.warnings == ()


@pytest.mark.parametrize(("unit", "scale"), [(1, 1000.0), (3, 0.001), (0, 1.0), (7, 1.0)])
def test_units_of_length_are_converted_and_noted(tmp_path: Path, read_scan: Read, unit: int, scale: float) -> None:
    affine = np.diag([2 / scale, 2 / scale, 3 / scale, 1])
    scan = read_scan(save(tmp_path / "scan", INTEGERS, affine, xyzt_units=unit))
    np.testing.assert_allclose(scan.volume.spacing, [2, 2, 3], rtol=1e-6)
    assert len(scan.source.notes) == 1


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (42, np.array([-3], "<i2"), (NotAVolume, InvalidHeader)),
        (42, np.array([32767] * 3, "<i2"), (TooManyVoxels,)),
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
def test_an_invalid_header_is_refused(
    tmp_path: Path, read_scan: Read, at: int, value: np.ndarray[Any, Any], error: tuple[type[CounterpartError], ...]
) -> None:
    path = save(tmp_path / "scan", INTEGERS, np.eye(4))
    content = bytearray(path.read_bytes())
    content[at : at + value.nbytes] = value.tobytes()
    path.write_bytes(content)
    with pytest.raises(error):
        read_scan(path)


@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
def test_header_extensions_are_not_parsed(tmp_path: Path, read_scan: Read, image_class: type[nib.Nifti1Image]) -> None:
    """nibabel parses an extension of the DICOM type with pydicom, and raises an error if it is not DICOM."""
    array = np.arange(512, dtype=np.float32).reshape(8, 8, 8)
    image = image_class(array, np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"abcd\xff\xfe\xfd\xfc"))
    content = bytearray(image.to_bytes())
    code = image.header.sizeof_hdr + 8  # behind the flag and the size of the extension
    assert content[code : code + 4] == b"\x06\0\0\0"
    content[code] = 2  # DICOM
    (tmp_path / "scan.nii").write_bytes(content)
    np.testing.assert_array_equal(read_scan(tmp_path / "scan.nii").volume.array, array)


# ---- faults that are repaired with a note, or refused by name ----------------------------------


def set_bytes(path: Path, changes: dict[int, bytes]) -> Path:
    content = bytearray(path.read_bytes())
    for at, value in changes.items():
        content[at : at + len(value)] = value
    path.write_bytes(content)
    return path


def save_both_forms(path: Path, volume: Volume, affine: Any) -> Path:
    image = nib.Nifti1Image(volume.array, affine)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    path.write_bytes(image.to_bytes())
    return path


def test_voxels_that_begin_at_zero_are_read_from_the_end_of_the_header(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    path = save(tmp_path / "scan", volume.array, volume.affine, vox_offset=0)
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.volume.array, volume.array)
    (note,) = scan.source.notes
    assert "vox_offset" in note
    packed = tmp_path / "scan.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    np.testing.assert_array_equal(read_scan(packed).volume.array, volume.array)


def test_voxels_that_begin_at_zero_are_refused_beside_extensions(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    path = save(tmp_path / "scan", volume.array, volume.affine, vox_offset=0)
    with pytest.raises(InvalidHeader, match="vox_offset"):
        read_scan(set_bytes(path, {348: b"\1"}))
    second = nib.Nifti2Image(volume.array, volume.affine).to_bytes()
    (tmp_path / "second").write_bytes(second)
    with pytest.raises(InvalidHeader, match="vox_offset"):
        read_scan(set_bytes(tmp_path / "second", {168: bytes(8)}))


@pytest.mark.parametrize("broken", [np.zeros(12, "<f4"), np.full(12, np.nan, "<f4"), np.ones(12, "<f4")])
def test_the_qform_is_used_beside_a_broken_sform(
    tmp_path: Path, read_scan: Read, volume: Volume, broken: np.ndarray[Any, Any]
) -> None:
    affine = make_affine(SPACING, OBLIQUE)
    path = set_bytes(save_both_forms(tmp_path / "scan", volume, affine), {280: broken.tobytes()})
    scan = read_scan(path)
    np.testing.assert_allclose(scan.volume.affine, affine, atol=1e-4)
    (note,) = scan.source.notes
    assert "qform is used" in note
    assert scan.source.sform_code == 1


@pytest.mark.parametrize("at", [76 + 4, 256])  # voxel size, quaternion
def test_the_sform_is_used_beside_a_broken_qform(tmp_path: Path, read_scan: Read, volume: Volume, at: int) -> None:
    affine = make_affine(SPACING, OBLIQUE)
    path = set_bytes(save_both_forms(tmp_path / "scan", volume, affine), {at: np.array([np.nan], "<f4").tobytes()})
    scan = read_scan(path)
    np.testing.assert_allclose(scan.volume.affine, affine, atol=1e-4)
    (note,) = scan.source.notes
    assert "sform is used" in note


def test_a_broken_qform_alone_is_refused(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    path = save_both_forms(tmp_path / "scan", volume, volume.affine)
    with pytest.raises(InvalidGeometry):
        read_scan(set_bytes(path, {254: bytes(2), 256: np.array([5], "<f4").tobytes()}))


@pytest.mark.parametrize("lengths", [(4, 32, 34, 14, 0), (5, 32, 34, 14, 0, 0), (7, 32, 34, 14, 1, 0, 1, 0)])
def test_a_length_of_zero_behind_the_third_axis_is_one(
    tmp_path: Path, read_scan: Read, volume: Volume, lengths: tuple[int, ...]
) -> None:
    path = save(tmp_path / "scan", volume.array, volume.affine)
    dim = np.zeros(8, "<i2")
    dim[: len(lengths)] = lengths
    scan = read_scan(set_bytes(path, {40: dim.tobytes(), 112: bytes(8)}))  # the slope is 0, too
    np.testing.assert_array_equal(scan.volume.array, volume.array)
    (note,) = scan.source.notes
    assert "length of 0" in note


@pytest.mark.parametrize("lengths", [(3, 0, 34, 14), (4, 32, 34, 0, 1)])
def test_a_length_of_zero_along_another_axis_is_refused(
    tmp_path: Path, read_scan: Read, volume: Volume, lengths: tuple[int, ...]
) -> None:
    path = save(tmp_path / "scan", volume.array, volume.affine)
    with pytest.raises(NotAVolume):
        read_scan(set_bytes(path, {40: np.array(lengths, "<i2").tobytes()}))


@pytest.mark.parametrize(
    ("unit", "name", "voxel"), [(1, "meter", 3.0), (1, "meter", 0.1), (3, "micron", 3.0), (0, "no unit", 0.003)]
)
def test_a_unit_that_no_scan_has_is_refused_by_name(
    tmp_path: Path, read_scan: Read, volume: Volume, unit: int, name: str, voxel: float
) -> None:
    affine = np.diag([voxel, voxel, voxel, 1])
    with pytest.raises(InvalidGeometry, match=name):
        read_scan(save(tmp_path / "scan", volume.array, affine, xyzt_units=unit))


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", ">i2", ">f4", ">f8"])
@pytest.mark.parametrize("scaling", [(0, 0), (1, 0), (0.37, 0), (1, -1024), (3.3e-3, 17.25), (-2.1, 1e4), (np.nan, 0)])
def test_the_values_are_those_of_nibabel(
    tmp_path: Path,
    read_scan: Read,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    scaling: tuple[float, float],
) -> None:
    monkeypatch.setattr(volume_file, "CHUNK_BYTES", 1000)  # several chunks
    rng = np.random.default_rng(3)
    array = (rng.random((7, 9, 11)) * 120).astype(dtype)
    header = nib.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    image = nib.Nifti1Image(array, np.eye(4), header, dtype=np.dtype(dtype))
    (tmp_path / "scan.nii").write_bytes(image.to_bytes())
    numbers = np.array(scaling, ">f4" if dtype.startswith(">") else "<f4")
    path = set_bytes(tmp_path / "scan.nii", {112: numbers.tobytes()})
    expected = nib.Nifti1Image.from_filename(path).get_fdata(dtype=np.float32)
    np.testing.assert_array_equal(read_scan(path).volume.array, expected)
