"""Folders and archives that mean harm, or that nobody thought about."""

import io
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from app.errors import CounterpartError, EmptyUpload, NoImageInArchive, NotAVolume, TruncatedFile
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.ingest.test_archive import make_zip
from tests.support.dicom import Series, datasets, save, scanned, write_series

MANY = 10_000
# Of the processor: a loaded machine takes its time, and a quadratic reader would take hours.
MOST_SECONDS = 60


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"tiny", NoImageInArchive),
        (bytes(128) + b"DICM", TruncatedFile),
        (bytes(128) + b"DICM\2\0\0\0UL\4\0\0\0\0\0", TruncatedFile),
    ],
)
def test_ten_thousand_tiny_files(
    tmp_path: Path, read_scan: Read, content: bytes, error: type[CounterpartError]
) -> None:
    path = make_zip(tmp_path / "many.zip", {f"{i % 97}/{i}": content for i in range(MANY)}, zipfile.ZIP_STORED)
    start = time.process_time()
    with pytest.raises(error):
        read_scan(path)
    assert time.process_time() - start < MOST_SECONDS


def test_a_series_among_ten_thousand_tiny_files(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = {str(path): path.read_bytes() for path in write_series(tmp_path / "s", volume)}
    path = make_zip(tmp_path / "many.zip", {**{f"{i}": b"tiny" for i in range(MANY)}, **slices})
    np.testing.assert_array_equal(read_scan(path).volume.array, scanned(volume, "axial")[0])


def test_very_many_orientations_end_soon(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    """Every frame is compared with the stacks there are: their number is bounded."""
    dataset = datasets(volume)[0]
    folder = tmp_path / "s"
    folder.mkdir()
    for k in range(300):
        a = k / 100
        dataset.SOPInstanceUID = f"1.2.{k}"
        dataset.ImageOrientationPatient = [f"{v:.6f}" for v in (np.cos(a), np.sin(a), 0, -np.sin(a), np.cos(a), 0)]
        dataset.save_as(folder / str(k))
    start = time.process_time()
    with pytest.raises(NotAVolume, match="more than 100 orientations"):
        read_scan(folder)
    assert time.process_time() - start < MOST_SECONDS


def test_links_in_a_folder_are_not_followed(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    elsewhere = tmp_path / "elsewhere"
    save(elsewhere, datasets(volume, Series(name="elsewhere")))
    folder = tmp_path / "s"
    write_series(folder, volume)
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "file").symlink_to(next(elsewhere.iterdir()))
    scan = read_scan(folder)
    assert len(scan.source.instances) == 14
    assert scan.source.notes == ()
    only_links = tmp_path / "links"
    only_links.mkdir()
    (only_links / "file").symlink_to(next(elsewhere.iterdir()))
    with pytest.raises(EmptyUpload):
        read_scan(only_links)


def test_an_archive_in_an_archive_is_not_opened(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    paths = write_series(tmp_path / "s", volume)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        for path in paths:
            archive.write(path, path.name)
    with pytest.raises(NoImageInArchive, match="an archive inside an archive is not opened"):
        read_scan(make_zip(tmp_path / "outer.zip", {"inner.zip": inner.getvalue()}))


@pytest.mark.parametrize("name", ["con", "a/b/c/" * 40 + "d", "\u202egnp.mcd", "a\nb", "ä" * 100, ".", "~/x", "-rf"])
def test_any_name_will_do(tmp_path: Path, read_scan: Read, volume: Volume, name: str) -> None:
    content = {f"{name}{i}": path.read_bytes() for i, path in enumerate(write_series(tmp_path / "s", volume))}
    scan = read_scan(make_zip(tmp_path / "a.zip", content))
    np.testing.assert_array_equal(scan.volume.array, scanned(volume, "axial")[0])
