"""One set of checks for every reader: what a scanner or a tool writes comes back, voxel by voxel and in its place.

nibabel's way: a class of checks, and a class for each reader that inherits them all.
"""

import gzip
import itertools
from pathlib import Path
from typing import Any, ClassVar, Literal

import nibabel as nib
import numpy as np
import pytest
from nibabel import affines, orientations

from app.volume import Affine, Scan, Volume
from tests.ingest.conftest import Read, placed
from tests.support.dicom import Series, save, write_series, zipped
from tests.support.enhanced import enhanced
from tests.support.mosaic import mosaic

LAYOUTS = [
    np.column_stack([axes, flips])
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]
ANGLES = {"straight": (0.0, 0.0, 0.0), "oblique": (0.2, -0.35, 0.5)}
SPACING = (0.9, 1.1, 2.0)


def numbered() -> Volume:
    """Every voxel another whole number, so that each can be followed; no two axes alike."""
    shape = (11, 13, 12)
    array = np.random.default_rng(3).permutation(int(np.prod(shape))).reshape(shape)
    return Volume(array.astype(np.float32), placed(SPACING))


def laid_out(layout: Any, angles: tuple[float, float, float]) -> Volume:
    """The same voxels in the same places, stored along other axes."""
    whole = numbered()
    array = orientations.apply_orientation(whole.array, layout)
    affine = placed(SPACING, angles) @ orientations.inv_ornt_aff(layout, whole.shape)
    return Volume(np.ascontiguousarray(array), affine)


def places(volume: Volume) -> Affine:
    """RAS+ mm of each voxel, in the order of their numbers, (V, 3)."""
    order = np.argsort(volume.array, axis=None)
    index = np.stack(np.unravel_index(order, volume.shape), axis=1)
    return np.asarray(affines.apply_affine(volume.affine, index))


class RoundTrip:
    """The checks. A reader's class says how to write a volume, and what the file's precision is."""

    format: ClassVar[Literal["nifti", "mgh", "dicom"]]
    modality: ClassVar[Literal["MR", "CT"] | None] = None
    # Millimetres: as far as a coordinate may move by being written in the format's numbers.
    precision: ClassVar[float]
    keeps_layout: ClassVar[bool] = True
    notes: ClassVar[tuple[str, ...]] = ()

    def write(self, folder: Path, volume: Volume) -> Path:
        """A file, or a folder of files, with the volume; each reader's class has its own."""
        raise NotImplementedError

    def check(self, scan: Scan, volume: Volume) -> None:
        """Every number is there once, where it was."""
        np.testing.assert_array_equal(np.sort(scan.volume.array, axis=None), np.sort(volume.array, axis=None))
        np.testing.assert_allclose(places(scan.volume), places(volume), rtol=0, atol=self.precision)
        np.testing.assert_allclose(scan.volume.spacing.prod(), volume.spacing.prod(), rtol=1e-5)
        if self.keeps_layout:
            np.testing.assert_array_equal(scan.volume.array, volume.array)
            np.testing.assert_allclose(scan.volume.affine, volume.affine, atol=self.precision)
        else:
            # Slices run along the normal of rows and columns: a left-handed stack is turned over, and nothing else.
            turned = np.linalg.det(volume.affine[:3, :3]) > 0  # RAS+; DICOM's LPS+ has the same hand
            step = -1 if not turned else 1
            np.testing.assert_array_equal(scan.volume.array, volume.array[..., ::step])
            assert np.linalg.det(scan.volume.affine[:3, :3]) > 0

    @pytest.mark.parametrize("angles", ANGLES.values(), ids=ANGLES)
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "".join(orientations.ornt2axcodes(layout)))
    def test_every_axis_layout(
        self, tmp_path: Path, read_scan: Read, layout: Any, angles: tuple[float, float, float]
    ) -> None:
        volume = laid_out(layout, angles)
        self.check(read_scan(self.write(tmp_path / "scan", volume)), volume)

    def test_it_says_what_it_is(self, tmp_path: Path, read_scan: Read) -> None:
        scan = read_scan(self.write(tmp_path / "scan", laid_out(LAYOUTS[0], ANGLES["oblique"])))
        source = scan.source
        assert (source.format, source.modality, source.notes) == (self.format, self.modality, self.notes)
        assert source.resampled is False
        assert scan.volume.array.dtype == np.float32
        assert scan.volume.affine.dtype == np.float64
        assert bool(source.instances) == bool(source.series_uid) == (self.format == "dicom")

    def test_it_reads_the_same_again_and_out_of_a_zip(self, tmp_path: Path, read_scan: Read) -> None:
        volume = laid_out(LAYOUTS[13], ANGLES["oblique"])
        path = self.write(tmp_path / "scan", volume)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        one, two = read_scan(path), read_scan(zipped(tmp_path / "a.zip", reversed(files)))
        self.check(two, volume)
        np.testing.assert_array_equal(one.volume.array, two.volume.array)
        np.testing.assert_array_equal(one.volume.affine, two.volume.affine)

    def test_files_that_say_nothing_beside_it_do_not_matter(self, tmp_path: Path, read_scan: Read) -> None:
        volume = laid_out(LAYOUTS[30], ANGLES["straight"])
        folder = tmp_path / "disc"
        self.write(folder / "deep" / "er", volume)
        (folder / "README.txt").write_text("nothing")
        (folder / "empty").touch()
        self.check(read_scan(folder), volume)


# ---- one file, one volume ----------------------------------------------------------------------


class OneFile(RoundTrip):
    """Formats that keep a volume as it is."""

    def content(self, volume: Volume) -> bytes:
        raise NotImplementedError

    def write(self, folder: Path, volume: Volume) -> Path:
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(self.content(volume))
        return folder / "file"

    def test_gzipped(self, tmp_path: Path, read_scan: Read) -> None:
        volume = laid_out(LAYOUTS[21], ANGLES["oblique"])
        (tmp_path / "packed").write_bytes(gzip.compress(self.content(volume)))
        self.check(read_scan(tmp_path / "packed"), volume)


class TestNifti1(OneFile):
    format, precision = "nifti", 2e-5  # float32
    kind: ClassVar[type[nib.Nifti1Image]] = nib.Nifti1Image

    def content(self, volume: Volume) -> bytes:
        image = self.kind(volume.array.astype(np.int16), volume.affine)
        image.header.set_xyzt_units("mm")
        return bytes(image.to_bytes())


class TestNifti2(TestNifti1):
    precision = 1e-9
    kind = nib.Nifti2Image


class TestMgh(OneFile):
    format, precision = "mgh", 5e-5  # the centre and unit vectors, in float32

    def content(self, volume: Volume) -> bytes:
        return bytes(nib.MGHImage(volume.array.astype(np.int32), volume.affine).to_bytes())


# ---- DICOM -------------------------------------------------------------------------------------


class TestSingleFrameMr(RoundTrip):
    format = "dicom"
    modality: ClassVar[Literal["MR", "CT"] | None] = "MR"
    precision, keeps_layout = 1e-6, False  # a decimal string of 16 characters

    def series(self) -> Series:
        return Series(plane=None, modality=self.modality or "MR")

    def write(self, folder: Path, volume: Volume) -> Path:
        write_series(folder, volume, self.series())
        return folder


class TestSingleFrameCt(TestSingleFrameMr):
    modality = "CT"


class TestEnhancedMr(TestSingleFrameMr):
    def write(self, folder: Path, volume: Volume) -> Path:
        (path,) = save(folder, [enhanced(volume, self.series())])
        return path


class TestEnhancedCt(TestEnhancedMr):
    modality = "CT"


class TestMosaic(TestSingleFrameMr):
    notes = ("A Siemens mosaic: one image with 12 slices side by side.",)

    def write(self, folder: Path, volume: Volume) -> Path:
        (path,) = save(folder, [mosaic(volume, self.series())])
        return path
