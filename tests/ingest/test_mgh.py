import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.errors import CounterpartError, InvalidGeometry, NotAVolume, TooManyVoxels, TruncatedFile
from app.ingest.reader import Limits
from app.volume import Volume
from tests.ingest.conftest import Read


def save(path: Path, array: np.ndarray[Any, Any], affine: Any) -> Path:
    path.write_bytes(nib.MGHImage(array, affine).to_bytes())
    return path


@pytest.mark.parametrize("dtype", ["u1", ">i2", ">i4", ">f4"])
def test_every_number_type(tmp_path: Path, read_scan: Read, dtype: str) -> None:
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    np.testing.assert_array_equal(read_scan(save(tmp_path / "scan", array, np.eye(4))).volume.array, array)


def test_gzipped_is_the_same_scan(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    plain = save(tmp_path / "a", volume.array, volume.affine)
    (tmp_path / "b").write_bytes(gzip.compress(plain.read_bytes()))
    one, two = read_scan(plain), read_scan(tmp_path / "b")
    np.testing.assert_array_equal(one.volume.array, two.volume.array)
    np.testing.assert_array_equal(one.volume.affine, two.volume.affine)


def test_the_footer_is_optional(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    path = save(tmp_path / "scan", volume.array, volume.affine)
    path.write_bytes(path.read_bytes()[: 284 + volume.array.nbytes])
    np.testing.assert_array_equal(read_scan(path).volume.array, volume.array)


def test_no_position_is_said(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    path = save(tmp_path / "scan", volume.array, volume.affine)
    content = bytearray(path.read_bytes())
    content[28:30] = b"\0\0"  # goodRASFlag
    path.write_bytes(content)
    scan = read_scan(path)
    assert scan.source.sform_code == 0
    assert "no position in space" in scan.source.notes[0]
    assert "".join(nib.aff2axcodes(scan.volume.affine)) == "LIA"


def changed(at: int, value: bytes, content: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (16, b"\0\0\0\2", NotAVolume),  # frames
        (4, b"\x7f\xff\xff\xff", TooManyVoxels),
        (30, b"\0\0\0\0", InvalidGeometry),  # millimetres along the first axis
        (30, b"\x7f\xc0\0\0", InvalidGeometry),
    ],
)
def test_headers_that_cannot_be(
    tmp_path: Path, read_scan: Read, volume: Volume, at: int, value: bytes, error: type[CounterpartError]
) -> None:
    path = save(tmp_path / "scan", volume.array, volume.affine)
    path.write_bytes(changed(at, value, path.read_bytes()))
    with pytest.raises(error):
        read_scan(path)


@pytest.mark.parametrize("keep", [100, 300, 5000])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_cut_short(tmp_path: Path, read_scan: Read, volume: Volume, keep: int, pack: Any) -> None:
    content = save(tmp_path / "scan", volume.array, volume.affine).read_bytes()[:keep]
    (tmp_path / "scan").write_bytes(pack(content))
    with pytest.raises(TruncatedFile):
        read_scan(tmp_path / "scan")


def test_limits(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    with pytest.raises(TooManyVoxels, match="15232 voxels"):
        read_scan(save(tmp_path / "scan", volume.array, volume.affine), limits=Limits(max_voxels=15_231))
