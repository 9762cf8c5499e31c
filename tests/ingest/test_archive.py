"""Zip archives: hostile, unusual and damaged ones."""

import io
import stat
import struct
import time
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from isal import isal_zlib

from app.errors import CounterpartError, NoImageInArchive, SeveralSeries, TruncatedFile, UnsafeArchive
from app.ingest import archive
from app.ingest.reader import Limits
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.dicom import reorient, write_series

MANY = 10_000
# Processor seconds: a busy machine takes its time, and a quadratic reader would take hours.
MAX_SECONDS = 60


@pytest.fixture(scope="session")
def nifti(volume: Volume) -> bytes:
    return bytes(nib.Nifti1Image(volume.array, volume.affine).to_bytes())


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as made:
        for name, content in files.items():
            made.writestr(name, content)
    return path


def test_one_nifti_among_other_files_is_read(tmp_path: Path, read_scan: Read, volume: Volume, nifti: bytes) -> None:
    path = make_zip(tmp_path / "a", {"readme.txt": b"hello", "__MACOSX/._a.nii": b"\0\5\x16\7", "a/scan": nifti})
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.volume.array, volume.array)
    assert scan.source.format == "nifti"


def test_names_are_never_used_as_paths(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = write_series(tmp_path / "s", volume)
    names = ["../../{}", "/tmp/{}", "C:\\{}", "a/../../../{}"]  # noqa: S108 - names that an attacker writes
    path = make_zip(tmp_path / "evil.zip", {names[i % 4].format(i): file.read_bytes() for i, file in enumerate(slices)})
    before = set(tmp_path.rglob("*"))
    scan = read_scan(path)
    scratch = tmp_path / "scratch"
    assert len(scan.source.instances) == 14
    assert all(file.is_relative_to(scratch) and file.name.isdigit() for file in scan.source.instances)
    assert {file for file in set(tmp_path.rglob("*")) - before if not file.is_relative_to(scratch)} == set()


@pytest.mark.parametrize("name", ["con", "a/b/c/" * 40 + "d", "\u202egnp.mcd", "a\nb", "ä" * 100, ".", "~/x", "-rf"])
def test_unusual_names_are_accepted(tmp_path: Path, read_scan: Read, volume: Volume, name: str) -> None:
    content = {f"{name}{i}": path.read_bytes() for i, path in enumerate(write_series(tmp_path / "s", volume))}
    scan = read_scan(make_zip(tmp_path / "a.zip", content))
    np.testing.assert_array_equal(scan.volume.array, reorient(volume, "axial")[0])


def test_links_are_left_out(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    path = make_zip(tmp_path / "a.zip", {"scan.nii": nifti})
    with zipfile.ZipFile(path, "a") as made:
        link = zipfile.ZipInfo("link.nii")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        made.writestr(link, nifti)
    assert read_scan(path).volume.shape == (32, 34, 14)  # two NIfTI files would be SeveralSeries


def test_a_bomb_stops_at_the_limit(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    path = make_zip(tmp_path / "bomb.zip", {"a.nii": nifti + bytes(24_000_000)})
    assert path.stat().st_size < 500_000
    with pytest.raises(UnsafeArchive):
        read_scan(path, limits=Limits(max_inflated_bytes=10_000_000))
    assert sum(file.stat().st_size for file in (tmp_path / "scratch").rglob("*") if file.is_file()) <= 10_000_000


def test_a_stated_size_beyond_the_limit_is_refused_before_extraction(
    tmp_path: Path, read_scan: Read, nifti: bytes
) -> None:
    path = make_zip(tmp_path / "bomb.zip", {"a.nii": nifti, "b.nii": nifti + bytes(24_000_000)})
    with pytest.raises(UnsafeArchive):
        read_scan(path, limits=Limits(max_inflated_bytes=10_000_000))
    files = [file for file in (tmp_path / "scratch").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) == len(nifti)


def test_the_limit_counts_all_files(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    path = make_zip(tmp_path / "a.zip", {f"{i}.nii": nifti for i in range(5)})
    with pytest.raises(UnsafeArchive):
        read_scan(path, limits=Limits(max_inflated_bytes=3 * len(nifti)))


def test_too_many_files_are_refused(tmp_path: Path, read_scan: Read) -> None:
    path = make_zip(tmp_path / "a.zip", {f"{i}": b"" for i in range(11)})
    with pytest.raises(UnsafeArchive):
        read_scan(path, limits=Limits(max_files=10))


def test_a_directory_that_states_a_huge_size_is_not_read(tmp_path: Path, read_scan: Read) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 1, 1, 2**31, 0, 0))
    with pytest.raises(UnsafeArchive):
        read_scan(path)


def test_a_password_is_refused(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    path = make_zip(tmp_path / "a.zip", {"scan.nii": nifti})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # flags of the local header
    content[content.rfind(b"PK\x01\x02") + 8] |= 1  # flags of the directory
    path.write_bytes(content)
    with pytest.raises(UnsafeArchive, match="password"):
        read_scan(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_without_a_bound_is_refused(tmp_path: Path, read_scan: Read, nifti: bytes, method: int) -> None:
    with pytest.raises(UnsafeArchive, match="deflate"):
        read_scan(make_zip(tmp_path / "a.zip", {"scan.nii": nifti}, method))


def test_an_archive_inside_an_archive_is_not_opened(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as made:
        made.writestr("scan.nii", nifti)
    with pytest.raises(NoImageInArchive):
        read_scan(make_zip(tmp_path / "outer.zip", {"inner.zip": inner.getvalue()}))


@pytest.mark.parametrize("files", [{}, {"readme.txt": b"hello"}, {"empty.dcm": b""}])
def test_an_archive_without_an_image_is_refused(tmp_path: Path, read_scan: Read, files: dict[str, bytes]) -> None:
    with pytest.raises(NoImageInArchive):
        read_scan(make_zip(tmp_path / "a.zip", files))


def test_two_scans_are_refused(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    with pytest.raises(SeveralSeries):
        read_scan(make_zip(tmp_path / "a.zip", {"a.nii": nifti, "b.nii": nifti}))


def move_first_entry(content: bytes) -> bytes:
    """State that the directory begins later, so that an entry begins before the archive; found by fuzzing."""
    end = content.rfind(b"PK\x05\x06")
    at = struct.unpack_from("<L", content, end + 16)[0]
    return content[: end + 16] + struct.pack("<L", at + 1000) + content[end + 20 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:10],
        lambda content: content[:3000],
        lambda content: content[:-1],
        lambda content: content[:2000] + bytes(100) + content[2100:],
        move_first_entry,
    ],
    ids=["first bytes", "half", "last byte missing", "damaged inside", "entry before the archive"],
)
def test_a_damaged_archive_is_refused(tmp_path: Path, read_scan: Read, nifti: bytes, damage: object) -> None:
    path = make_zip(tmp_path / "a.zip", {"scan.nii": nifti})
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TruncatedFile):
        read_scan(path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"tiny", NoImageInArchive),
        (bytes(128) + b"DICM", TruncatedFile),
        (bytes(128) + b"DICM\2\0\0\0UL\4\0\0\0\0\0", TruncatedFile),
    ],
)
def test_ten_thousand_tiny_files_are_refused_soon(
    tmp_path: Path, read_scan: Read, content: bytes, error: type[CounterpartError]
) -> None:
    path = make_zip(tmp_path / "many.zip", {f"{i % 97}/{i}": content for i in range(MANY)}, zipfile.ZIP_STORED)
    start = time.process_time()
    with pytest.raises(error):
        read_scan(path)
    assert time.process_time() - start < MAX_SECONDS


def test_a_series_among_ten_thousand_tiny_files_is_read(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = {str(path): path.read_bytes() for path in write_series(tmp_path / "s", volume)}
    path = make_zip(tmp_path / "many.zip", {**{f"{i}": b"tiny" for i in range(MANY)}, **slices})
    np.testing.assert_array_equal(read_scan(path).volume.array, reorient(volume, "axial")[0])


def test_igzip_inflates_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window_bits: list[int] = []
    decompressobj = isal_zlib.decompressobj

    def record(bits: int) -> object:
        window_bits.append(bits)
        return decompressobj(bits)

    monkeypatch.setattr(isal_zlib, "decompressobj", record)
    files = {"noise": np.random.default_rng(0).bytes(3_000_000), "zeros": bytes(3_000_000)}
    path = make_zip(tmp_path / "a.zip", files)
    unpacked = archive.unpack(path, tmp_path / "scratch", Limits(), lambda _: True)
    assert [path.read_bytes() for path in unpacked] == list(files.values())
    assert window_bits == [-15, -15]


def make_zip64(files: dict[str, bytes], *, stated_files: int | None = None, stated_bytes: int | None = None) -> bytes:
    """Return an archive as streaming writers make it: all numbers in 64-bit fields, and none in the 32-bit ones."""
    out, directory = bytearray(), bytearray()
    for name, content in files.items():
        at, path, crc = len(out), name.encode(), zlib.crc32(content)
        sizes = struct.pack("<HHQQ", 1, 16, len(content), len(content))
        common = (45, 0, 0, 0, 0, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(path))
        out += struct.pack("<4sHHHHHLLLHH", b"PK\3\4", *common, len(sizes)) + path + sizes + content
        sizes = struct.pack("<HHQQQ", 1, 24, len(content), len(content), at)
        directory += struct.pack("<4sHHHHHHLLLHHHHHLL", b"PK\1\2", 45, *common, len(sizes), 0, 0, 0, 0, 0xFFFFFFFF)
        directory += path + sizes
    start = len(out)
    end = start + len(directory)
    counts = (len(files) if stated_files is None else stated_files,) * 2
    length = len(directory) if stated_bytes is None else stated_bytes
    record = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, *counts, length, start)
    record += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    last = struct.pack("<4sHHHHLLH", b"PK\5\6", 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return bytes(out + directory + record + last)


def test_an_archive_with_64_bit_records_is_read(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = {path.name: path.read_bytes() for path in write_series(tmp_path / "s", volume)}
    (tmp_path / "a.zip").write_bytes(make_zip64(slices))
    np.testing.assert_array_equal(read_scan(tmp_path / "a.zip").volume.array, reorient(volume, "axial")[0])


@pytest.mark.parametrize("stated", [{"stated_files": 2**40}, {"stated_bytes": 2**40}])
def test_64_bit_records_that_state_too_much_are_refused(
    tmp_path: Path, read_scan: Read, nifti: bytes, stated: dict[str, int]
) -> None:
    (tmp_path / "a.zip").write_bytes(make_zip64({"scan.nii": nifti}, **stated))
    with pytest.raises(UnsafeArchive):
        read_scan(tmp_path / "a.zip")


def test_a_damaged_64_bit_record_is_refused(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    content = make_zip64({"scan.nii": nifti})
    (tmp_path / "a.zip").write_bytes(content.replace(b"PK\6\6", b"PK\6\5"))
    with pytest.raises(TruncatedFile):
        read_scan(tmp_path / "a.zip")
