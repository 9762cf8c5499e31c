"""Pairs of a header and an image, NIfTI and Analyze."""

import gzip
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.errors import CounterpartError, InvalidHeader, NotAnImageFormat, SeveralSeries, TooManyVoxels, TruncatedFile
from app.ingest.limits import Limits
from app.volume import Volume
from tests.ingest.conftest import Read

MANY = 3000
# Processor seconds: a quadratic search would take minutes.
MAX_SECONDS = 60
CLASSES = {
    "NIfTI-1": nib.Nifti1Pair,
    "NIfTI-2": nib.Nifti2Pair,
    "Analyze": nib.AnalyzeImage,
    "SPM": nib.Spm99AnalyzeImage,
}
every_class = pytest.mark.parametrize("image_class", CLASSES.values(), ids=CLASSES)


def write_pair(folder: Path, image_class: Any, volume: Volume, name: str = "T1") -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    image = image_class(volume.array.astype(np.int16), volume.affine)
    nib.save(image, folder / f"{name}.img")
    for path in folder.glob("*.mat"):  # of SPM
        path.unlink()
    return folder / f"{name}.hdr", folder / f"{name}.img"


def as_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def zip_pair(header: Path, image: Path, path: Path) -> Path:
    return as_zip(path, {"a/T1.hdr": header.read_bytes(), "a/T1.img": image.read_bytes()})


WAYS: dict[str, Callable[[Path, Path], Path]] = {
    "folder": lambda header, _: header.parent,
    "header": lambda header, _: header,
    "image": lambda _, image: image,
    "zip": lambda header, image: zip_pair(header, image, header.parent.parent / "a.zip"),
}


@every_class
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_pair_is_read(
    tmp_path: Path, read_scan: Read, volume: Volume, image_class: Any, way: Callable[[Path, Path], Path]
) -> None:
    header, image = write_pair(tmp_path / "s", image_class, volume)
    scan = read_scan(way(header, image))
    np.testing.assert_array_equal(scan.volume.array, volume.array)
    np.testing.assert_allclose(scan.volume.spacing, volume.spacing, rtol=1e-5)
    if issubclass(image_class, nib.Nifti1Pair):
        np.testing.assert_allclose(scan.volume.affine, volume.affine, atol=1e-4)
    else:
        assert any("left and right may be exchanged" in note for note in scan.source.notes)


def test_a_pair_of_the_other_byte_order_is_read(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    classes: list[Any] = [nib.Nifti1Pair, nib.AnalyzeImage]
    for image_class in classes:
        header = image_class.header_class(endianness=">")
        header.set_data_dtype(">i2")
        image = image_class(volume.array.astype(">i2"), volume.affine, header)
        folder = tmp_path / image_class.__name__
        folder.mkdir()
        nib.save(image, folder / "T1.img")
        np.testing.assert_array_equal(read_scan(folder).volume.array, volume.array)


def test_a_gzipped_pair_is_read(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    header, image = write_pair(tmp_path / "s", nib.Nifti1Pair, volume)
    packed = {f"x/T1{path.suffix}.gz": gzip.compress(path.read_bytes()) for path in (header, image)}
    for path in (header, image):
        path.write_bytes(gzip.compress(path.read_bytes()))
        path.rename(path.with_name(f"{path.name}.gz"))
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, volume.array)
    np.testing.assert_array_equal(read_scan(as_zip(tmp_path / "a.zip", packed)).volume.array, volume.array)


def test_an_image_that_looks_like_another_format_is_the_image(tmp_path: Path, read_scan: Read) -> None:
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    array.reshape(-1, order="F")[:2] = 0x0008, 0x0005  # the first element of a DICOM data set
    volume = Volume(np.asfortranarray(array).astype(np.float32), np.eye(4))
    header, image = write_pair(tmp_path / "s", nib.Nifti1Pair, volume)
    assert read_scan(tmp_path / "s").volume.shape == (3, 4, 5)
    assert read_scan(zip_pair(header, image, tmp_path / "a.zip")).volume.shape == (3, 4, 5)


@every_class
@pytest.mark.parametrize("in_zip", [False, True])
def test_a_lone_header_is_named(
    tmp_path: Path, read_scan: Read, volume: Volume, image_class: Any, *, in_zip: bool
) -> None:
    header, image = write_pair(tmp_path / "s", image_class, volume)
    image.unlink()
    (tmp_path / "s" / "readme").write_text("nothing")
    files = {path.name: path.read_bytes() for path in header.parent.iterdir()}
    for upload in [as_zip(tmp_path / "a.zip", files)] if in_zip else [header, tmp_path / "s"]:
        with pytest.raises(NotAnImageFormat, match="header of a pair"):
            read_scan(upload)


def test_two_pairs_are_two_scans(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    write_pair(tmp_path / "s", nib.Nifti1Pair, volume, "a")
    write_pair(tmp_path / "s", nib.AnalyzeImage, volume, "b")
    with pytest.raises(SeveralSeries):
        read_scan(tmp_path / "s")


def test_a_truncated_image_is_refused(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    _, image = write_pair(tmp_path / "s", nib.Nifti1Pair, volume)
    image.write_bytes(image.read_bytes()[:-1])
    with pytest.raises(TruncatedFile):
        read_scan(tmp_path / "s")


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (42, np.array([32767] * 3, "<i2"), TooManyVoxels),
        (70, np.array([4242], "<i2"), InvalidHeader),
        (108, np.array([np.nan], "<f4"), InvalidHeader),
        (108, np.array([1e30], "<f4"), TruncatedFile),
    ],
)
@pytest.mark.parametrize("image_class", [nib.Nifti1Pair, nib.AnalyzeImage])
def test_an_invalid_header_is_refused(  # noqa: PLR0913 - fixtures and parameters
    tmp_path: Path,
    read_scan: Read,
    volume: Volume,
    image_class: Any,
    at: int,
    value: np.ndarray[Any, Any],
    error: type[CounterpartError],
) -> None:
    header, _ = write_pair(tmp_path / "s", image_class, volume)
    content = bytearray(header.read_bytes())
    content[38:39] = b"r"  # tells Analyze from other files
    content[at : at + value.nbytes] = value.tobytes()
    header.write_bytes(content)
    with pytest.raises(error):
        read_scan(tmp_path / "s")
    files = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000


def test_many_pairs_are_refused_soon(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    small = Volume(volume.array[:3, :3, :3], volume.affine)
    header, image = write_pair(tmp_path / "s", nib.Nifti1Pair, small)
    contents = {".hdr": header.read_bytes(), ".img": image.read_bytes()}
    files = {f"{number}{suffix}": content for number in range(MANY) for suffix, content in contents.items()}
    start = time.process_time()
    with pytest.raises(SeveralSeries):
        read_scan(as_zip(tmp_path / "a.zip", files), limits=Limits())
    assert time.process_time() - start < MAX_SECONDS
