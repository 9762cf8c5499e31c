"""Files that contain one volume: checks that all such formats share, plain and gzipped."""

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.errors import TooManyVoxels, TruncatedFile
from app.ingest import volume_file
from app.ingest.reader import Limits
from app.ingest.volume_file import looks_hounsfield
from app.volume import Volume
from tests.ingest.conftest import Read

Pack = Callable[[bytes], bytes]
FORMATS = {"nifti": nib.Nifti1Image, "mgh": nib.MGHImage}
every_format = pytest.mark.parametrize("image_class", FORMATS.values(), ids=FORMATS)
plain_and_gzipped = pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzipped"])


def to_bytes(image_class: Any, volume: Volume) -> bytes:
    return bytes(image_class(volume.array, volume.affine).to_bytes())


@every_format
@plain_and_gzipped
@pytest.mark.parametrize("keep", [100, 300, 351, 400, 5000])
def test_a_truncated_file_is_refused(
    tmp_path: Path, read_scan: Read, volume: Volume, image_class: Any, pack: Pack, keep: int
) -> None:
    (tmp_path / "scan").write_bytes(pack(to_bytes(image_class, volume)[:keep]))
    with pytest.raises(TruncatedFile):
        read_scan(tmp_path / "scan")


@pytest.mark.parametrize("keep", [12, 20, 5000, -4])
def test_a_truncated_gzip_stream_is_refused(tmp_path: Path, read_scan: Read, volume: Volume, keep: int) -> None:
    (tmp_path / "scan").write_bytes(gzip.compress(to_bytes(nib.Nifti1Image, volume))[:keep])
    with pytest.raises(TruncatedFile):
        read_scan(tmp_path / "scan")


def test_a_wrong_gzip_checksum_is_refused(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    content = bytearray(gzip.compress(to_bytes(nib.Nifti1Image, volume)))
    content[-8] ^= 0xFF
    (tmp_path / "scan").write_bytes(content)
    with pytest.raises(TruncatedFile):
        read_scan(tmp_path / "scan")


def test_a_gzip_bomb_is_inflated_only_to_the_last_voxel(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    (tmp_path / "scan").write_bytes(gzip.compress(to_bytes(nib.Nifti1Image, volume) + bytes(16_000_000)))
    scan = read_scan(tmp_path / "scan", limits=Limits(max_inflated_bytes=1_000_000))
    np.testing.assert_array_equal(scan.volume.array, volume.array)


@every_format
def test_a_stated_size_that_cannot_be_in_the_file_is_refused_before_it_is_inflated(
    tmp_path: Path, read_scan: Read, monkeypatch: pytest.MonkeyPatch, volume: Volume, image_class: Any
) -> None:
    image = image_class(np.zeros((4, 4, 4), np.int16), volume.affine)
    head = bytearray(image.to_bytes())
    at, lengths = (
        (40, np.array([3, 500, 500, 1000], "<i2"))
        if image_class is nib.Nifti1Image
        else (
            4,
            np.array([500, 500, 1000], ">i4"),
        )
    )
    head[at : at + lengths.nbytes] = lengths.tobytes()
    (tmp_path / "scan").write_bytes(gzip.compress(bytes(head) + bytes(20_000_000)))
    monkeypatch.setattr(volume_file, "CHUNK_BYTES", None)  # reading would fail
    with pytest.raises(TruncatedFile, match="gzip file of this size"):
        read_scan(tmp_path / "scan")


@every_format
def test_reading_needs_little_more_memory_than_the_result(
    tmp_path: Path, read_scan: Read, volume: Volume, image_class: Any
) -> None:
    array = np.zeros((200, 200, 100), np.int16)
    array[50:150, 50:150, 20:80] = 700
    image = image_class(array, volume.affine)
    image.to_filename(path := tmp_path / ("scan.nii" if image_class is nib.Nifti1Image else "scan.mgh"))
    tracemalloc.start()
    try:
        read_scan(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 4 * array.size


@every_format
@plain_and_gzipped
def test_too_many_voxels_are_refused(
    tmp_path: Path, read_scan: Read, volume: Volume, image_class: Any, pack: Pack
) -> None:
    (tmp_path / "scan").write_bytes(pack(to_bytes(image_class, volume)))
    with pytest.raises(TooManyVoxels, match="15232"):
        read_scan(tmp_path / "scan", limits=Limits(max_voxels=15_231))
    with pytest.raises(TooManyVoxels):
        read_scan(tmp_path / "scan", limits=Limits(max_inflated_bytes=60_000))


@pytest.mark.parametrize(
    ("air", "fraction", "expected"), [(-1000, 0.5, True), (-1024, 0.03, True), (-1000, 0.01, False)]
)
def test_hounsfield_units_are_recognised_by_air(air: int, fraction: float, *, expected: bool) -> None:
    array = np.random.default_rng(0).integers(-150, 1500, (20, 20, 20)).astype(np.float32)
    array.reshape(-1)[: int(fraction * array.size)] = air
    assert looks_hounsfield(array) is expected
    assert not looks_hounsfield(np.maximum(array, 0))
