"""Format detection, and the selection of one scan among many files."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.errors import CounterpartError, EmptyUpload, NotAnImageFormat, SeveralSeries, UnsafeArchive
from app.ingest.reader import ACCEPTED_FORMATS, HEAD_BYTES, READERS, Limits, detect_format
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.dicom import Series, make_datasets, save, write_series


def nifti_bytes(image_class: type[nib.Nifti1Image] = nib.Nifti1Image, order: str = "<") -> bytes:
    header = image_class.header_class(endianness=order)
    header.set_data_shape((3, 4, 5))
    return bytes(image_class(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4), header).to_bytes())


@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti_of_both_byte_orders_is_detected(image_class: type[nib.Nifti1Image], order: str) -> None:
    assert detect_format(nifti_bytes(image_class, order)[:HEAD_BYTES]) == "nifti"


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\x1f\x8b\x08\x00rest", "gzip"),
        (b"PK\x03\x04rest", "zip"),
        (b"PK\x05\x06" + b"\0" * 18, "zip"),
        (b"\0" * 128 + b"DICM\x02\0", "dicom"),
        (b"\x08\0\x05\0CS\x0a\0ISO_IR 100", "dicom"),
        (nifti_bytes()[:200], "nifti"),  # a truncated header
    ],
)
def test_other_signatures_are_detected(head: bytes, expected: str) -> None:
    assert detect_format(head) == expected


@pytest.mark.parametrize(
    "head",
    [
        b"dear doctor, please find attached",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"\0" * HEAD_BYTES,
        b"x",
        nifti_bytes()[:344] + b"\0\0\0\0",  # Analyze 7.5 has the size and no magic number
        nifti_bytes()[:344] + b"ni1\0",  # the header of a NIfTI pair
    ],
)
def test_other_files_are_refused(head: bytes) -> None:
    with pytest.raises(NotAnImageFormat):
        detect_format(head)


def test_nothing_is_refused() -> None:
    with pytest.raises(EmptyUpload):
        detect_format(b"")


def test_the_list_of_formats_names_every_reader() -> None:
    assert all(reader.title in ACCEPTED_FORMATS for reader in READERS)


@pytest.mark.parametrize("content", [b"a text about a scan\n" * 50, b"", b"\0" * 128 + b"DICM", gzip.compress(b"x")])
def test_gzip_of_another_file_is_refused(tmp_path: Path, read_scan: Read, content: bytes) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(content))
    with pytest.raises(NotAnImageFormat):
        read_scan(tmp_path / "scan.nii.gz")


@pytest.mark.parametrize("content", [gzip.compress(b"a text"), gzip.compress(nifti_bytes())[:12], b"\x1f\x8b\x08\x00"])
def test_gzip_without_an_image_is_ignored_in_a_folder(tmp_path: Path, read_scan: Read, content: bytes) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a").write_bytes(content)
    (tmp_path / "s" / "b").write_bytes(nifti_bytes())
    assert read_scan(tmp_path / "s").volume.shape == (3, 4, 5)


@pytest.mark.parametrize("with_dicom", [False, True])
def test_two_scans_in_a_folder_are_refused(
    tmp_path: Path, read_scan: Read, volume: Volume, *, with_dicom: bool
) -> None:
    write_series(tmp_path / "s", volume)
    if not with_dicom:
        for path in (tmp_path / "s").iterdir():
            path.unlink()
        (tmp_path / "s" / "b").write_bytes(nifti_bytes())
    (tmp_path / "s" / "a").write_bytes(nifti_bytes())
    with pytest.raises(SeveralSeries):
        read_scan(tmp_path / "s")


def test_too_many_files_in_a_folder_are_refused(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    write_series(tmp_path / "s", volume)
    with pytest.raises(UnsafeArchive):
        read_scan(tmp_path / "s", limits=Limits(max_files=13))


def test_links_in_a_folder_are_not_followed(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    elsewhere = tmp_path / "elsewhere"
    save(elsewhere, make_datasets(volume, Series(name="elsewhere")))
    folder, links = tmp_path / "s", tmp_path / "links"
    write_series(folder, volume)
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "file").symlink_to(next(elsewhere.iterdir()))
    scan = read_scan(folder)
    assert (len(scan.source.instances), scan.source.notes) == (14, ())
    links.mkdir()
    (links / "file").symlink_to(next(elsewhere.iterdir()))
    with pytest.raises(EmptyUpload):
        read_scan(links)


def test_default_limits_accept_a_large_ct() -> None:
    assert Limits().max_voxels >= 512 * 512 * 600
    assert Limits().max_inflated_bytes >= 4 * 512 * 512 * 600


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_random_headers_raise_only_errors_of_ours(tmp_path: Path, read_scan: Read, volume: Volume, kind: str) -> None:
    if kind == "nifti":
        content, first, last = nifti_bytes(), 4, 344
    else:
        (path,) = save(tmp_path / "s", make_datasets(volume)[:1])
        content = path.read_bytes()
        first, last = 132, len(content) - 2176
    rng = np.random.default_rng(5)
    codes = set()
    for _ in range(60):
        broken = bytearray(content)
        for at in rng.integers(first, last, rng.integers(1, 30)):
            broken[at] = rng.integers(256)
        (tmp_path / "scan").write_bytes(broken)
        try:
            read_scan(tmp_path / "scan")
        except CounterpartError as error:
            codes.add(error.code)
    assert len(codes) >= 3
