"""Format detection, and the selection of one scan among many files."""

import gzip
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from app.errors import (
    CounterpartError,
    EmptyUpload,
    NoImageInArchive,
    NotAnImageFormat,
    SeveralSeries,
    UnsafeArchive,
    UploadTooLarge,
)
from app.ingest.reader import ACCEPTED_FORMATS, HEAD_BYTES, READERS, RESULT_DICOM_NAMES, Limits, detect_format
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


@pytest.mark.parametrize(
    "content", [b"a text about a scan\n" * 50, b"", b"\0" * 128 + b"DICM", gzip.compress(b"x", mtime=0)]
)
def test_gzip_of_another_file_is_refused(tmp_path: Path, read_scan: Read, content: bytes) -> None:
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(content))
    with pytest.raises(NotAnImageFormat):
        read_scan(tmp_path / "scan.nii.gz")


@pytest.mark.parametrize(
    "content", [gzip.compress(b"a text", mtime=0), gzip.compress(nifti_bytes(), mtime=0)[:12], b"\x1f\x8b\x08\x00"]
)
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


def test_a_folder_of_links_is_read(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    plain = read_scan(write_series(tmp_path / "store", volume)[0].parent)
    to_files, to_folder = tmp_path / "files", tmp_path / "folder"
    to_files.mkdir()
    to_folder.mkdir()
    for number, path in enumerate(sorted((tmp_path / "store").iterdir())):
        (to_files / f"{number}").symlink_to(path)
    (to_folder / "series").symlink_to(tmp_path / "store", target_is_directory=True)
    for folder in (to_files, to_folder):
        scan = read_scan(folder)
        np.testing.assert_array_equal(scan.volume.array, plain.volume.array)
        assert scan.source.notes == ()


def test_links_that_lead_back_are_followed_once(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    folder = tmp_path / "a" / "s"
    paths = write_series(folder, volume)
    (tmp_path / "a" / "other").write_bytes(nifti_bytes())
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "twice").symlink_to(paths[0])
    scan = read_scan(folder)
    assert (len(scan.source.instances), scan.source.notes) == (14, ())


def test_links_without_a_target_are_named(tmp_path: Path, read_scan: Read) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "missing").symlink_to(tmp_path / "nowhere")
    with pytest.raises(EmptyUpload, match="1 symbolic links"):
        read_scan(folder)
    (folder / "scan").write_bytes(nifti_bytes())
    scan = read_scan(folder)
    assert "1 symbolic links" in scan.source.notes[-1]


def test_a_pipe_is_read(tmp_path: Path, read_scan: Read) -> None:
    content = gzip.compress(nifti_bytes())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(pipe.write_bytes, content)
        assert read_scan(pipe).volume.shape == (3, 4, 5)
        written.result()


@pytest.mark.parametrize(("content", "error"), [(b"", EmptyUpload), (bytes(2000), UploadTooLarge)])
def test_an_empty_or_endless_pipe_is_refused(
    tmp_path: Path, read_scan: Read, content: bytes, error: type[CounterpartError]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(pipe.write_bytes, content)
        with pytest.raises(error):
            read_scan(pipe, limits=Limits(max_inflated_bytes=1000))
        written.result()


def result_bytes() -> bytes:
    image = nib.Nifti1Image.from_bytes(nifti_bytes())
    image.header["descrip"] = b"counterpart: 1 where the scan differs from its counterpart; research use only"
    return bytes(image.to_bytes())


def test_results_of_counterpart_beside_a_scan_are_ignored(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    write_series(tmp_path / "s", volume)
    first = read_scan(tmp_path / "s")
    for folder in (tmp_path / "s" / "result", tmp_path / "s"):
        folder.mkdir(exist_ok=True)
        (folder / "mask.nii.gz").write_bytes(gzip.compress(result_bytes()))
        (folder / "anomaly.nii").write_bytes(result_bytes())
        (folder / "report.json").write_text('{\n "notice": "-",\n "research_use_only": true}\n')
        for name in RESULT_DICOM_NAMES:
            save(tmp_path / "other", make_datasets(volume, Series(name=f"{folder.name} {name}"))[:1])
            next((tmp_path / "other").iterdir()).rename(folder / name)
        (folder / ".unpacked-abc").mkdir()
        (folder / ".unpacked-abc" / "000000").write_bytes(nifti_bytes())
        again = read_scan(tmp_path / "s")
        np.testing.assert_array_equal(again.volume.array, first.volume.array)
        assert again.source.notes == first.source.notes


def test_a_result_alone_can_be_read(tmp_path: Path, read_scan: Read) -> None:
    (tmp_path / "mask.nii").write_bytes(result_bytes())
    assert read_scan(tmp_path / "mask.nii").volume.shape == (3, 4, 5)


def test_a_folder_of_results_is_refused_by_name(tmp_path: Path, read_scan: Read) -> None:
    for name in ("a.nii", "b.nii"):
        (tmp_path / name).write_bytes(result_bytes())
    with pytest.raises(NoImageInArchive, match="results of Counterpart"):
        read_scan(tmp_path)


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
