import stat
import struct
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from isal import isal_zlib

from app.errors import NoImageInArchive, SeveralSeries, TruncatedFile, UnsafeArchive
from app.ingest.reader import Limits
from app.ingest import archive
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.dicom import write_series, zipped


@pytest.fixture(scope="session")
def nifti(volume: Volume) -> bytes:
    return bytes(nib.Nifti1Image(volume.array, volume.affine).to_bytes())


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as made:
        for name, content in files.items():
            made.writestr(name, content)
    return path


def test_one_nifti_among_other_files(tmp_path: Path, read_scan: Read, volume: Volume, nifti: bytes) -> None:
    path = make_zip(tmp_path / "a", {"readme.txt": b"hello", "__MACOSX/._a.nii": b"\0\5\x16\7", "a/scan": nifti})
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.volume.array, volume.array)
    assert scan.source.format == "nifti"


def test_names_are_never_used_as_paths(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = write_series(tmp_path / "s", volume)
    names = ["../../{}", "/tmp/{}", "C:\\{}", "a/../../../{}"]  # noqa: S108 - what an attacker writes
    path = make_zip(tmp_path / "evil.zip", {names[i % 4].format(i): file.read_bytes() for i, file in enumerate(slices)})
    before = set(tmp_path.rglob("*"))
    scan = read_scan(path)
    scratch = tmp_path / "scratch"
    assert len(scan.source.instances) == 14
    assert all(file.is_relative_to(scratch) and file.name.isdigit() for file in scan.source.instances)
    assert {file for file in set(tmp_path.rglob("*")) - before if not file.is_relative_to(scratch)} == set()


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
    with pytest.raises(UnsafeArchive, match="inflates to more than 10 MB"):
        read_scan(path, limits=Limits(max_inflated_bytes=10_000_000))
    assert sum(file.stat().st_size for file in (tmp_path / "scratch").rglob("*") if file.is_file()) <= 10_000_000


def test_the_limit_is_over_all_files(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    path = make_zip(tmp_path / "a.zip", {f"{i}.nii": nifti for i in range(5)})
    with pytest.raises(UnsafeArchive, match="inflates to more than"):
        read_scan(path, limits=Limits(max_inflated_bytes=3 * len(nifti)))


def test_too_many_files(tmp_path: Path, read_scan: Read) -> None:
    path = make_zip(tmp_path / "a.zip", {f"{i}": b"" for i in range(11)})
    with pytest.raises(UnsafeArchive, match="more than 10 files"):
        read_scan(path, limits=Limits(max_files=10))


def test_a_directory_that_announces_too_much_is_not_even_read(tmp_path: Path, read_scan: Read) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 1, 1, 2**31, 0, 0))
    with pytest.raises(UnsafeArchive, match="more than 20000 files"):
        read_scan(path)


def test_a_password(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    path = make_zip(tmp_path / "a.zip", {"scan.nii": nifti})
    content = bytearray(path.read_bytes())
    content[6] |= 1  # local header's flags
    content[content.rfind(b"PK\x01\x02") + 8] |= 1  # the directory's
    path.write_bytes(content)
    with pytest.raises(UnsafeArchive, match="password"):
        read_scan(path)


def test_a_compression_that_inflates_without_bound(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    with pytest.raises(UnsafeArchive, match="other than deflate"):
        read_scan(make_zip(tmp_path / "a.zip", {"scan.nii": nifti}, zipfile.ZIP_BZIP2))


@pytest.mark.parametrize("files", [{}, {"readme.txt": b"hello"}, {"empty.dcm": b""}, {"inner.zip": b"PK\x03\x04..."}])
def test_no_image_in_it(tmp_path: Path, read_scan: Read, files: dict[str, bytes]) -> None:
    with pytest.raises(NoImageInArchive):
        read_scan(make_zip(tmp_path / "a.zip", files))


def test_two_scans(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    with pytest.raises(SeveralSeries, match="2 NIfTI or MGH and 0 DICOM"):
        read_scan(make_zip(tmp_path / "a.zip", {"a.nii": nifti, "b.nii": nifti}))


@pytest.mark.parametrize("keep", [10, 3000, -1])
def test_cut_short(tmp_path: Path, read_scan: Read, nifti: bytes, keep: int) -> None:
    path = make_zip(tmp_path / "a.zip", {"scan.nii": nifti})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TruncatedFile):
        read_scan(path)


def test_an_entry_that_begins_before_the_archive(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    """Found by fuzzing: the directory is said to lie further on than it does."""
    path = make_zip(tmp_path / "a.zip", {"scan.nii": nifti})
    content = bytearray(path.read_bytes())
    end = content.rfind(b"PK\x05\x06")
    at = struct.unpack_from("<L", content, end + 16)[0]
    struct.pack_into("<L", content, end + 16, at + 1000)
    path.write_bytes(content)
    with pytest.raises(TruncatedFile):
        read_scan(path)


def test_damaged_inside(tmp_path: Path, read_scan: Read, nifti: bytes) -> None:
    path = make_zip(tmp_path / "a.zip", {"scan.nii": nifti})
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(TruncatedFile):
        read_scan(path)


def test_a_zipped_series_is_read_as_its_folder(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    files = write_series(tmp_path / "s", volume)
    folder, packed = read_scan(tmp_path / "s"), read_scan(zipped(tmp_path / "s.zip", files))
    np.testing.assert_array_equal(folder.volume.array, packed.volume.array)
    np.testing.assert_array_equal(folder.volume.affine, packed.volume.affine)


def test_entries_are_inflated_by_igzip_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    inflater = isal_zlib.decompressobj

    def noted(bits: int) -> object:
        made.append(bits)
        return inflater(bits)

    monkeypatch.setattr(isal_zlib, "decompressobj", noted)
    head = b"\0" * 128 + b"DICM"
    files = {"noise": head + np.random.default_rng(0).bytes(3_000_000), "zeros": head + bytes(3_000_000)}
    unpacked = archive.unpack(make_zip(tmp_path / "a.zip", files), tmp_path / "scratch", Limits())
    assert [path.read_bytes() for path in unpacked] == list(files.values())
    assert made == [-15, -15]
