"""Files that announce more than they contain are refused before memory of that size is used."""

import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless

from app.errors import TooManyVoxels, TruncatedFile, UnsafeArchive
from app.ingest.dicom.codestream import announced_size
from app.ingest.dicom.deflated import check_deflated
from app.ingest.dicom.mosaic import MAX_TILES
from app.ingest.reader import DEFAULT_LIMITS, Limits
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.proofs.fuzz_ingest import resident_mb
from tests.support.dicom import Series, make_datasets, save
from tests.support.encoded import BY_GDCM, DATA, recode
from tests.support.enhanced import make_enhanced
from tests.support.mosaic import make_mosaic

JPEG_START_OF_FRAME = {
    "1.2.840.10008.1.2.4.57": b"\xff\xc3",
    "1.2.840.10008.1.2.4.70": b"\xff\xc3",
    "1.2.840.10008.1.2.4.80": b"\xff\xf7",
}
LARGE = 60_000
MAX_SECONDS, MAX_MB = 2, 100


def first_frame(path: Path) -> bytes:
    return next(generate_frames(dcmread(path).PixelData, number_of_frames=1))


def replace_frame(path: Path, frame: bytes) -> None:
    dataset = dcmread(path)
    dataset.PixelData = encapsulate([frame])
    dataset.save_as(path)


def check_refused_soon(read_scan: Read, path: Path, error: type[Exception]) -> None:
    """Check that a scan is refused in little time and memory."""
    start, before = time.process_time(), resident_mb()
    with pytest.raises(error):
        read_scan(path)
    assert time.process_time() - start < MAX_SECONDS
    assert resident_mb() - before < MAX_MB


@pytest.fixture
def dataset(volume: Volume) -> FileDataset:
    return make_datasets(volume)[0]


@pytest.mark.parametrize("syntax", sorted(set(BY_GDCM) - {"1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5"}))
def test_the_size_of_every_codec_is_found(tmp_path: Path, dataset: FileDataset, syntax: str) -> None:
    if syntax == "1.2.840.10008.1.2.4.50":
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelData = 7, bytes(34 * 32)
    (path,) = save(tmp_path, [dataset])
    recode(path, syntax)
    assert announced_size(first_frame(path)) == (34, 32)


@pytest.mark.parametrize("path", sorted(DATA.glob("*.*")), ids=lambda path: path.name)
def test_the_size_of_encoded_files_is_found(path: Path) -> None:
    assert announced_size(path.read_bytes()) == (45, 38)


@pytest.mark.parametrize("wrapped", [False, True], ids=["codestream", "JP2"])
def test_a_large_jpeg_2000_is_refused(tmp_path: Path, read_scan: Read, dataset: FileDataset, *, wrapped: bool) -> None:
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    (path,) = save(tmp_path, [dataset])
    frame = bytearray(first_frame(path))
    struct.pack_into(">2I", frame, 8, LARGE, LARGE)
    content = bytes(frame)
    if wrapped:
        content = b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">I4s", 8 + len(content), b"jp2c") + content
    assert announced_size(content) == (LARGE, LARGE)
    replace_frame(path, content)
    check_refused_soon(read_scan, path, TruncatedFile)


@pytest.mark.parametrize("syntax", JPEG_START_OF_FRAME)
def test_a_large_jpeg_is_refused(tmp_path: Path, read_scan: Read, dataset: FileDataset, syntax: str) -> None:
    (path,) = save(tmp_path, [dataset])
    recode(path, syntax)
    frame = bytearray(first_frame(path))
    struct.pack_into(">2H", frame, frame.index(JPEG_START_OF_FRAME[syntax]) + 5, LARGE, LARGE)
    replace_frame(path, bytes(frame))
    check_refused_soon(read_scan, path, TruncatedFile)


def test_a_hidden_size_of_jpeg_ls_is_refused(tmp_path: Path, read_scan: Read, dataset: FileDataset) -> None:
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    (path,) = save(tmp_path, [dataset])
    frame = first_frame(path)
    oversize = b"\xff\xf8\0\x0c\x04\x04" + struct.pack(">2I", LARGE, LARGE)
    replace_frame(path, frame[:2] + oversize + frame[2:])
    check_refused_soon(read_scan, path, TruncatedFile)


def test_large_uncompressed_images_are_refused(tmp_path: Path, read_scan: Read, dataset: FileDataset) -> None:
    dataset.Rows = dataset.Columns = LARGE
    (path,) = save(tmp_path, [dataset])
    check_refused_soon(read_scan, path, TooManyVoxels)


@pytest.mark.parametrize(("side", "count"), [(65_000, 65_000**2), (65_000, 36), (4096, MAX_TILES + 1)])
def test_a_large_mosaic_is_refused(tmp_path: Path, read_scan: Read, volume: Volume, side: int, count: int) -> None:
    mosaic = make_mosaic(volume)
    mosaic.Rows = mosaic.Columns = side
    header = mosaic[0x0029, 0x1010].value
    assert header.count(b"14\0") == 1
    # The value is a text with its length before it: a longer one takes the place of the padding.
    old, new = b"14\0", str(count).encode() + b"\0"
    fields = struct.pack("<4i", 0, len(old), 77, 0) + old + bytes(-len(old) % 4)
    assert fields in header
    padded = struct.pack("<4i", 0, len(new), 77, 0) + new + bytes(-len(new) % 4)
    mosaic[0x0029, 0x1010].value = header.replace(fields, padded)
    (path,) = save(tmp_path, [mosaic])
    check_refused_soon(read_scan, path, TooManyVoxels)


def test_inflated_bytes_are_summed_over_the_upload(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume, Series(syntax=DeflatedExplicitVRLittleEndian))
    save(tmp_path / "s", slices)
    one = 2 * 32 * 34
    assert read_scan(tmp_path / "s", limits=Limits(max_inflated_bytes=14 * (one + 2000))).volume.shape[2] == 14
    with pytest.raises(UnsafeArchive, match="files inflate to more than"):
        read_scan(tmp_path / "s", limits=Limits(max_inflated_bytes=13 * one))


def test_a_file_that_inflates_to_many_times_its_size_is_refused(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    (dataset,) = make_datasets(volume, Series(syntax=DeflatedExplicitVRLittleEndian))[:1]
    dataset.PixelData = bytes(200_000_000)
    (path,) = save(tmp_path, [dataset])
    check_refused_soon(read_scan, path, UnsafeArchive)


def test_padding_after_a_deflated_data_set_ends_the_check_of_its_size(tmp_path: Path, volume: Volume) -> None:
    (dataset,) = make_datasets(volume, Series(syntax=DeflatedExplicitVRLittleEndian))[:1]
    dataset.PixelData = np.random.default_rng(0).integers(0, 4, 3 << 20, np.uint8).tobytes()
    (path,) = save(tmp_path, [dataset])
    path.write_bytes(path.read_bytes() + b"\0")
    found: list[int] = []

    def check() -> None:
        found.append(check_deflated(path, DEFAULT_LIMITS.max_inflated_bytes, DEFAULT_LIMITS))

    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(30)
    assert [size >> 20 for size in found] == [3]


def test_a_file_with_many_more_frames_than_the_stack_is_refused(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    (path,) = save(tmp_path, [make_enhanced(volume, echoes_ms=[float(echo) for echo in range(1, 6)])])
    series = dcmread(path).SeriesInstanceUID
    limits = Limits(max_voxels=14 * 32 * 34)
    with pytest.raises(TooManyVoxels, match="70 frames"):
        read_scan(path, series=f"{series}/1", limits=limits)
