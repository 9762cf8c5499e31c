"""FreeSurfer's MGH files."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.errors import CounterpartError, InvalidGeometry, NotAVolume, TooManyVoxels
from app.volume import Volume
from tests.ingest.conftest import Read


def save(path: Path, array: np.ndarray[Any, Any], affine: Any, changes: dict[int, bytes] | None = None) -> Path:
    """Write a file, with some bytes changed."""
    content = bytearray(nib.MGHImage(array, affine).to_bytes())
    for at, value in (changes or {}).items():
        content[at : at + len(value)] = value
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", ["u1", ">i2", ">i4", ">f4"])
def test_every_number_type_is_read(tmp_path: Path, read_scan: Read, dtype: str) -> None:
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    np.testing.assert_array_equal(read_scan(save(tmp_path / "scan", array, np.eye(4))).volume.array, array)


def test_the_footer_is_optional(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    path = save(tmp_path / "scan", volume.array, volume.affine)
    path.write_bytes(path.read_bytes()[: 284 + volume.array.nbytes])
    np.testing.assert_array_equal(read_scan(path).volume.array, volume.array)


def test_a_missing_position_is_noted(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    scan = read_scan(save(tmp_path / "scan", volume.array, volume.affine, {28: b"\0\0"}))  # goodRASFlag
    assert scan.source.sform_code == 0
    assert len(scan.source.notes) == 1
    assert "".join(nib.aff2axcodes(scan.volume.affine)) == "LIA"


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (16, b"\0\0\0\2", NotAVolume),  # frames
        (4, b"\x7f\xff\xff\xff", TooManyVoxels),
        (30, b"\0\0\0\0", InvalidGeometry),  # millimetres along the first axis
        (30, b"\x7f\xc0\0\0", InvalidGeometry),
    ],
)
def test_an_invalid_header_is_refused(
    tmp_path: Path, read_scan: Read, volume: Volume, at: int, value: bytes, error: type[CounterpartError]
) -> None:
    with pytest.raises(error):
        read_scan(save(tmp_path / "scan", volume.array, volume.affine, {at: value}))
