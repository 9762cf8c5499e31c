"""Which of many frames are read: the rules, and what is said where they do not decide."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import MediaStorageDirectoryStorage

from app.errors import NotAVolume, SeveralSeries, UnknownSeries
from app.volume import Volume
from tests.ingest.conftest import Read, placed
from tests.support.dicom import Series, datasets, save, scanned, series_uid
from tests.support.enhanced import enhanced

UID = series_uid(Series())
Change = Callable[[FileDataset], object]


def another(volume: Volume, change: Change | None = None, series: Series | None = None) -> list[FileDataset]:
    """More images in the same series: negative, so that they can be told from the first."""
    series = series or Series(name="more")
    slices = datasets(Volume(volume.array.max() - volume.array, volume.affine), series)
    for dataset in slices:
        dataset.SeriesInstanceUID = UID
        if change:
            change(dataset)
    return slices


def echo(milliseconds: float) -> Change:
    return lambda dataset: setattr(dataset, "EchoTime", milliseconds)


def diffusion(b: float) -> Change:
    return lambda dataset: setattr(dataset, "DiffusionBValue", b)


def image_type(*values: str) -> Change:
    return lambda dataset: setattr(dataset, "ImageType", list(values))


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (echo(12.5), echo(90), ("echo 12.5 ms", "echo 90 ms")),
        (diffusion(0), diffusion(1000), ("b = 0", "b = 1000")),
    ],
    ids=["echoes", "b-values"],
)
def test_images_of_two_kinds_at_each_place_are_listed_and_one_can_be_named(
    tmp_path: Path, read_scan: Read, volume: Volume, first: Change, second: Change, said: tuple[str, str]
) -> None:
    slices = datasets(volume)
    for dataset in slices:
        first(dataset)
    save(tmp_path / "s", [*slices, *another(volume, second)])
    with pytest.raises(SeveralSeries, match="2 stacks of slices in one series") as refused:
        read_scan(tmp_path / "s")
    listed = [f"{UID}/{number}" for number in (1, 2)]
    advice = refused.value.advice
    names = {kind: name for name in listed for kind in said if f"{name} (14 MR slices, axial, {kind})" in advice}
    assert set(names) == set(said)
    array = scanned(volume, "axial")[0]
    np.testing.assert_array_equal(read_scan(tmp_path / "s", series=names[said[0]]).volume.array, array)
    np.testing.assert_array_equal(read_scan(tmp_path / "s", series=names[said[1]]).volume.array, array.max() - array)
    with pytest.raises(SeveralSeries):
        read_scan(tmp_path / "s", series=UID)
    with pytest.raises(UnknownSeries):
        read_scan(tmp_path / "s", series=f"{UID}/3")


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (image_type("ORIGINAL", "PRIMARY", "P", "ND"), "phase, real or imaginary stacks"),
        (lambda dataset: setattr(dataset, "ComplexImageComponent", "REAL"), "phase, real or imaginary stacks"),
    ],
    ids=["Siemens' phase", "standard's component"],
)
def test_magnitude_is_read(tmp_path: Path, read_scan: Read, volume: Volume, change: Change, note: str) -> None:
    save(tmp_path / "s", [*another(volume, change), *datasets(volume)])
    scan = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(scan.volume.array, scanned(volume, "axial")[0])
    assert scan.source.notes == (f"Left out: 1 {note}.",)


def test_derived_series_make_way_for_acquired_ones(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    reformatted = datasets(volume, Series(name="reformatted", plane="sagittal"))
    for dataset in reformatted:
        dataset.ImageType = ["DERIVED", "PRIMARY", "MPR"]
    save(tmp_path / "s", reformatted)
    alone = read_scan(tmp_path / "s")
    assert alone.source.notes == ("The images are derived from others (ImageType DERIVED), not as they were acquired.",)
    save(tmp_path / "s" / "2", datasets(volume))
    scan = read_scan(tmp_path / "s")
    assert (scan.source.series_uid, scan.source.notes) == (UID, ("Left out: 1 derived stacks.",))


def test_a_time_series_makes_way_for_a_volume(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    functional = [dataset for name in "ab" for dataset in datasets(volume, Series(name=name))]
    for dataset in functional:
        dataset.SeriesInstanceUID = "1.2.3"
    save(tmp_path / "s" / "1", functional)
    with pytest.raises(NotAVolume, match="2 images at each of 14 positions"):
        read_scan(tmp_path / "s")
    save(tmp_path / "s" / "2", datasets(volume))
    scan = read_scan(tmp_path / "s")
    assert (scan.source.series_uid, scan.source.notes) == (UID, ("Left out: 1 time series.",))
    with pytest.raises(NotAVolume):
        read_scan(tmp_path / "s", series="1.2.3")


def test_two_orientations_in_one_series(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    sagittal = datasets(volume, Series(name="other", plane="sagittal"))
    for dataset in sagittal:
        dataset.SeriesInstanceUID = UID
    save(tmp_path / "s", [*datasets(volume), *sagittal])
    with pytest.raises(SeveralSeries) as refused:
        read_scan(tmp_path / "s")
    assert f"{UID}/1 (32 MR slices, sagittal); {UID}/2 (14 MR slices, axial)." in refused.value.advice
    assert read_scan(tmp_path / "s", series=f"{UID}/2").volume.shape == scanned(volume, "axial")[0].shape


def test_echo_times_that_jitter_are_one_stack(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = datasets(volume)
    for k, dataset in enumerate(slices):
        dataset.EchoTime = 4.6 + 0.001 * (k % 3)
    save(tmp_path / "s", slices)
    assert read_scan(tmp_path / "s").volume.shape == (32, 34, 14)


def test_projections_around_a_head(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = datasets(volume) * 8
    for k, dataset in enumerate(slices):
        turned = placed((1, 1, 1), (0.0, 0.0, k / 50))
        dataset.ImageOrientationPatient = [f"{v:.8f}" for v in (*turned[:3, 0], *turned[:3, 1])]
        dataset.SOPInstanceUID = f"1.2.{k}"
        dataset.save_as(tmp_path / f"{k}")
    with pytest.raises(NotAVolume, match="more than 100 orientations"):
        read_scan(tmp_path)


def test_a_disc_with_its_directory_and_stray_files(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    save(tmp_path / "disc" / "DICOM" / "PAT00001", datasets(volume))
    directory = datasets(volume)[0]
    for element in list(directory):
        del directory[element.tag]
    directory.SOPClassUID = directory.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    directory.FileSetID, directory.DirectoryRecordSequence = "DISC", [Dataset()]
    directory.DirectoryRecordSequence[0].ReferencedFileID = ["DICOM", "PAT00001", "IM00001"]
    directory.save_as(tmp_path / "disc" / "DICOMDIR")
    (tmp_path / "disc" / "AUTORUN.INF").write_text("[autorun]")
    (tmp_path / "disc" / "VIEWER").mkdir()
    shutil.copy("/bin/true", tmp_path / "disc" / "VIEWER" / "VIEWER.EXE")
    scan = read_scan(tmp_path / "disc")
    np.testing.assert_array_equal(scan.volume.array, scanned(volume, "axial")[0])
    assert scan.source.notes == ("Left out: 1 DICOM files without an image.",)


# ---- enhanced multi-frame ----------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_an_enhanced_image_is_its_series(tmp_path: Path, read_scan: Read, volume: Volume, modality: str) -> None:
    turned = Volume(volume.array, placed((0.9, 1.1, 2.0), (0.2, -0.35, 0.5)))
    (path,) = save(tmp_path, [enhanced(turned, Series(modality=modality))])  # type: ignore[arg-type]
    scan = read_scan(path)
    array, affine = scanned(turned, "axial")
    np.testing.assert_array_equal(scan.volume.array, array)
    np.testing.assert_allclose(scan.volume.affine, affine, atol=1e-9)
    assert (scan.source.modality, scan.source.instances, scan.source.notes) == (modality, (path,), ())


def test_two_echoes_of_an_enhanced_image(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    (path,) = save(tmp_path, [enhanced(volume, echoes_ms=(8.0, 80.0))])
    with pytest.raises(SeveralSeries, match="2 stacks") as refused:
        read_scan(path)
    late = next(n for n in (1, 2) if f"{UID}/{n} (14 MR slices, axial, echo 80 ms)" in refused.value.advice)
    array = scanned(volume, "axial")[0]
    np.testing.assert_array_equal(read_scan(path, series=f"{UID}/{late}").volume.array, array // 2)
