"""Contract test of all readers: every voxel comes back at its position, from every kind of upload.

A new entry of `READERS` needs a sample here: `test_every_reader_has_a_sample` fails without it.
"""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pytest

from app.ingest.reader import HEAD_BYTES, READERS, detect_format
from app.volume import Scan, Volume
from tests.ingest.conftest import Read
from tests.support.dicom import Series, make_datasets, save, zip_files
from tests.support.enhanced import make_enhanced
from tests.support.geometry import ANGLES, LAYOUTS, OBLIQUE, STRAIGHT, layout_name, make_layout, voxel_positions
from tests.support.mosaic import make_mosaic

Modality = Literal["MR", "CT"]


@dataclass(frozen=True)
class Sample:
    """Synthetic scan of one format.

    Attributes
    ----------
    write : callable
        Write a volume into a new folder and return its files.
    precision_mm : float
        Largest rounding of a coordinate in the numbers of the format.
    modality : {"MR", "CT"} or None
        Modality that the format states.
    keeps_layout : bool
        The array comes back as stored. In DICOM, slices are ordered along the normal of rows and columns, so a
        left-handed stack is reversed.
    """

    format: str
    write: Callable[[Path, Volume], list[Path]]
    precision_mm: float
    modality: Modality | None = None
    keeps_layout: bool = True
    notes: tuple[str, ...] = ()

    def check(self, scan: Scan, volume: Volume) -> None:
        np.testing.assert_array_equal(np.sort(scan.volume.array, axis=None), np.sort(volume.array, axis=None))
        positions = voxel_positions(volume)
        np.testing.assert_allclose(voxel_positions(scan.volume), positions, rtol=0, atol=self.precision_mm)
        np.testing.assert_allclose(scan.volume.spacing.prod(), volume.spacing.prod(), rtol=1e-5)
        if self.keeps_layout:
            np.testing.assert_array_equal(scan.volume.array, volume.array)
            np.testing.assert_allclose(scan.volume.affine, volume.affine, atol=self.precision_mm)
        else:
            step = 1 if np.linalg.det(volume.affine[:3, :3]) > 0 else -1
            np.testing.assert_array_equal(scan.volume.array, volume.array[..., ::step])
            assert np.linalg.det(scan.volume.affine[:3, :3]) > 0


def file_sample(name: str, to_bytes: Callable[[Volume], bytes], precision_mm: float) -> Sample:
    def write(folder: Path, volume: Volume) -> list[Path]:
        folder.mkdir(parents=True)
        (folder / "scan").write_bytes(to_bytes(volume))
        return [folder / "scan"]

    return Sample(name, write, precision_mm)


def nifti(image_class: type[nib.Nifti1Image]) -> Callable[[Volume], bytes]:
    def to_bytes(volume: Volume) -> bytes:
        image = image_class(volume.array.astype(np.int16), volume.affine)
        image.header.set_xyzt_units("mm")
        return bytes(image.to_bytes())

    return to_bytes


def mgh(volume: Volume) -> bytes:
    return bytes(nib.MGHImage(volume.array.astype(np.int32), volume.affine).to_bytes())


def dicom_sample(make: Callable[[Volume, Series], Any], modality: Modality, *notes: str) -> Sample:
    def write(folder: Path, volume: Volume) -> list[Path]:
        made = make(volume, Series(plane=None, modality=modality))
        return save(folder, made if isinstance(made, list) else [made])

    # A decimal string has 16 characters.
    return Sample("dicom", write, 1e-6, modality, keeps_layout=False, notes=notes)


SAMPLES = {
    "NIfTI-1": file_sample("nifti", nifti(nib.Nifti1Image), 2e-5),  # float32
    "NIfTI-2": file_sample("nifti", nifti(nib.Nifti2Image), 1e-9),
    "MGH": file_sample("mgh", mgh, 5e-5),  # centre and unit vectors in float32
    "MR": dicom_sample(make_datasets, "MR"),
    "CT": dicom_sample(make_datasets, "CT"),
    "enhanced MR": dicom_sample(make_enhanced, "MR"),
    "enhanced CT": dicom_sample(make_enhanced, "CT"),
    "mosaic": dicom_sample(make_mosaic, "MR", "The image is a Siemens mosaic: it contains 12 slices side by side."),
}
every_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)


def test_every_reader_has_a_sample() -> None:
    assert {sample.format for sample in SAMPLES.values()} == {reader.format for reader in READERS}


@every_sample
@pytest.mark.parametrize("angles", ANGLES.values(), ids=ANGLES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
def test_every_axis_layout(
    tmp_path: Path, read_scan: Read, sample: Sample, layout: Any, angles: tuple[float, float, float]
) -> None:
    volume = make_layout(layout, angles)
    files = sample.write(tmp_path / "scan", volume)
    sample.check(read_scan(files[0] if len(files) == 1 else tmp_path / "scan"), volume)


@every_sample
def test_only_its_reader_matches(tmp_path: Path, sample: Sample) -> None:
    for path in sample.write(tmp_path / "scan", make_layout(LAYOUTS[0], STRAIGHT)):
        head = path.read_bytes()[:HEAD_BYTES]
        assert detect_format(head) == sample.format
        assert [reader.format for reader in READERS if reader.matches(head)] == [sample.format]


@every_sample
def test_source_and_types(tmp_path: Path, read_scan: Read, sample: Sample) -> None:
    sample.write(tmp_path / "scan", make_layout(LAYOUTS[0], OBLIQUE))
    scan = read_scan(tmp_path / "scan")
    source = scan.source
    assert (source.format, source.modality, source.notes) == (sample.format, sample.modality, sample.notes)
    assert source.resampled is False
    assert bool(source.instances) == bool(source.series_uid) == (sample.format == "dicom")
    assert scan.volume.array.dtype == np.float32
    assert scan.volume.affine.dtype == np.float64
    assert np.isfinite(scan.volume.array).all()


@every_sample
def test_zip_gives_the_same_scan(tmp_path: Path, read_scan: Read, sample: Sample) -> None:
    volume = make_layout(LAYOUTS[13], OBLIQUE)
    files = sample.write(tmp_path / "scan", volume)
    plain, zipped = read_scan(tmp_path / "scan"), read_scan(zip_files(tmp_path / "a.zip", reversed(files)))
    sample.check(zipped, volume)
    np.testing.assert_array_equal(zipped.volume.array, plain.volume.array)
    np.testing.assert_array_equal(zipped.volume.affine, plain.volume.affine)


GZIPPED = {reader.format for reader in READERS if reader.may_be_gzipped}


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if sample.format in GZIPPED])
def test_gzip_gives_the_same_scan(tmp_path: Path, read_scan: Read, name: str) -> None:
    sample, volume = SAMPLES[name], make_layout(LAYOUTS[21], OBLIQUE)
    (path,) = sample.write(tmp_path / "scan", volume)
    path.write_bytes(gzip.compress(path.read_bytes()))
    sample.check(read_scan(path), volume)
    assert list((tmp_path / "scratch").iterdir()) == []
    sample.check(read_scan(zip_files(tmp_path / "a.zip", [path])), volume)


@every_sample
def test_other_files_in_the_folder_are_ignored(tmp_path: Path, read_scan: Read, sample: Sample) -> None:
    volume = make_layout(LAYOUTS[30], STRAIGHT)
    sample.write(tmp_path / "disc" / "a" / "b", volume)
    (tmp_path / "disc" / "README.txt").write_text("nothing")
    (tmp_path / "disc" / "empty").touch()
    sample.check(read_scan(tmp_path / "disc"), volume)
