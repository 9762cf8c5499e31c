"""Selection of one stack among many frames."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import FileDataset

from app.errors import NotAVolume, SeveralSeries, UnknownSeries
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.dicom import Series, make_datasets, reorient, save, series_uid, write_series
from tests.support.enhanced import make_enhanced
from tests.support.geometry import OBLIQUE, SPACING, make_affine

UID = series_uid(Series())
# Processor seconds: a busy machine takes its time.
MAX_SECONDS = 60
Change = Callable[[FileDataset], object]


def make_negative(volume: Volume, change: Change) -> list[FileDataset]:
    """Return more images of the same series, with inverted values so that they differ from the first."""
    series = Series(name="more")
    slices = make_datasets(Volume(volume.array.max() - volume.array, volume.affine), series)
    for dataset in slices:
        dataset.SeriesInstanceUID = UID
        change(dataset)
    return slices


def echo(milliseconds: float) -> Change:
    return lambda dataset: setattr(dataset, "EchoTime", milliseconds)


def diffusion(b: float) -> Change:
    return lambda dataset: setattr(dataset, "DiffusionBValue", b)


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        (echo(12.5), echo(90), ("echo 12.5 ms", "echo 90 ms")),
        (diffusion(0), diffusion(1000), ("b = 0", "b = 1000")),
    ],
    ids=["echoes", "b-values"],
)
def test_two_echoes_or_b_values_are_listed_and_one_can_be_named(
    tmp_path: Path, read_scan: Read, volume: Volume, first: Change, second: Change, labels: tuple[str, str]
) -> None:
    slices = make_datasets(volume)
    for dataset in slices:
        first(dataset)
    save(tmp_path / "s", [*slices, *make_negative(volume, second)])
    with pytest.raises(SeveralSeries, match="2 stacks") as refused:
        read_scan(tmp_path / "s")
    listed = [f"{UID}/{number}" for number in (1, 2)]
    advice = refused.value.advice
    names = {x: name for name in listed for x in labels if f"{name} (14 MR slices, axial, {x})" in advice}
    assert set(names) == set(labels)
    array = reorient(volume, "axial")[0]
    np.testing.assert_array_equal(read_scan(tmp_path / "s", series=names[labels[0]]).volume.array, array)
    np.testing.assert_array_equal(read_scan(tmp_path / "s", series=names[labels[1]]).volume.array, array.max() - array)
    with pytest.raises(SeveralSeries):
        read_scan(tmp_path / "s", series=UID)
    with pytest.raises(UnknownSeries):
        read_scan(tmp_path / "s", series=f"{UID}/3")


@pytest.mark.parametrize(
    "change",
    [
        lambda dataset: setattr(dataset, "ImageType", ["ORIGINAL", "PRIMARY", "P", "ND"]),
        lambda dataset: setattr(dataset, "ComplexImageComponent", "REAL"),
    ],
    ids=["Siemens' phase", "standard's component"],
)
def test_magnitude_is_preferred(tmp_path: Path, read_scan: Read, volume: Volume, change: Change) -> None:
    save(tmp_path / "s", [*make_negative(volume, change), *make_datasets(volume)])
    scan = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(scan.volume.array, reorient(volume, "axial")[0])
    assert scan.source.notes == ("Left out: 1 phase, real or imaginary stacks.",)


def test_acquired_series_are_preferred_to_derived_ones(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    reformatted = make_datasets(volume, Series(name="reformatted", plane="sagittal"))
    for dataset in reformatted:
        dataset.ImageType = ["DERIVED", "PRIMARY", "MPR"]
    save(tmp_path / "s", reformatted)
    alone = read_scan(tmp_path / "s")
    assert "DERIVED" in alone.source.notes[0]
    save(tmp_path / "s" / "2", make_datasets(volume))
    scan = read_scan(tmp_path / "s")
    assert (scan.source.series_uid, scan.source.notes) == (UID, ("Left out: 1 derived stacks.",))


def test_a_volume_is_preferred_to_a_time_series(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    functional = [dataset for name in "ab" for dataset in make_datasets(volume, Series(name=name))]
    for dataset in functional:
        dataset.SeriesInstanceUID = "1.2.3"
    save(tmp_path / "s" / "1", functional)
    with pytest.raises(NotAVolume, match="2 images at each of 14 positions"):
        read_scan(tmp_path / "s")
    save(tmp_path / "s" / "2", make_datasets(volume))
    scan = read_scan(tmp_path / "s")
    assert (scan.source.series_uid, scan.source.notes) == (UID, ("Left out: 1 time series.",))
    with pytest.raises(NotAVolume):
        read_scan(tmp_path / "s", series="1.2.3")


def test_two_orientations_in_one_series_are_listed(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    sagittal = make_datasets(volume, Series(name="other", plane="sagittal"))
    for dataset in sagittal:
        dataset.SeriesInstanceUID = UID
    save(tmp_path / "s", [*make_datasets(volume), *sagittal])
    with pytest.raises(SeveralSeries) as refused:
        read_scan(tmp_path / "s")
    assert f"{UID}/1 (32 MR slices, sagittal); {UID}/2 (14 MR slices, axial)." in refused.value.advice
    assert read_scan(tmp_path / "s", series=f"{UID}/2").volume.shape == reorient(volume, "axial")[0].shape


def test_echo_times_that_jitter_are_one_stack(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume)
    for k, dataset in enumerate(slices):
        dataset.EchoTime = 4.6 + 0.001 * (k % 3)
    save(tmp_path / "s", slices)
    assert read_scan(tmp_path / "s").volume.shape == (32, 34, 14)


def test_many_orientations_are_refused_soon(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    """Each frame is compared with the stacks found so far, so their number is limited."""
    dataset = make_datasets(volume)[0]
    for k in range(300):
        rotated = make_affine((1, 1, 1), (0.0, 0.0, k / 100))
        dataset.ImageOrientationPatient = [f"{v:.8f}" for v in (*rotated[:3, 0], *rotated[:3, 1])]
        dataset.SOPInstanceUID = f"1.2.{k}"
        dataset.save_as(tmp_path / f"{k}")
    start = time.process_time()
    with pytest.raises(NotAVolume, match="more than 100 orientations"):
        read_scan(tmp_path)
    assert time.process_time() - start < MAX_SECONDS


def test_several_series_are_listed_and_one_can_be_named(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    one, two = Series(name="one"), Series(name="two", modality="CT")
    write_series(tmp_path / "s" / "1", volume, one)
    write_series(tmp_path / "s" / "2", volume, two)
    with pytest.raises(SeveralSeries) as refused:
        read_scan(tmp_path / "s")
    listed = f"{series_uid(one)} (14 MR slices, axial); {series_uid(two)} (14 CT slices, axial)."
    assert listed in refused.value.advice
    assert read_scan(tmp_path / "s", series=series_uid(two)).source.modality == "CT"
    with pytest.raises(UnknownSeries, match=series_uid(one)):
        read_scan(tmp_path / "s", series="1.2.3")


def test_a_few_slices_beside_a_stack_are_left_out(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    save(tmp_path / "s" / "1", make_datasets(volume))
    save(tmp_path / "s" / "2", make_datasets(volume, Series(name="key images"))[:9])
    scan = read_scan(tmp_path / "s")
    assert scan.source.series_uid == UID
    assert scan.source.notes == ("Left out: 1 stacks of fewer than 10 slices.",)


def test_a_list_of_series_has_at_most_ten_entries(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    for i in range(12):
        save(tmp_path / "s" / str(i), make_datasets(volume, Series(name=str(i)))[:1])
    with pytest.raises(SeveralSeries) as refused:
        read_scan(tmp_path / "s")
    assert refused.value.advice.count("(1 MR slices, axial)") == 10
    assert refused.value.advice.endswith("and 2 more.")


# ---- enhanced multi-frame ----------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_an_enhanced_image_is_a_series(tmp_path: Path, read_scan: Read, volume: Volume, modality: str) -> None:
    rotated = Volume(volume.array, make_affine(SPACING, OBLIQUE))
    (path,) = save(tmp_path, [make_enhanced(rotated, Series(modality=modality))])  # type: ignore[arg-type]
    scan = read_scan(path)
    array, affine = reorient(rotated, "axial")
    np.testing.assert_array_equal(scan.volume.array, array)
    np.testing.assert_allclose(scan.volume.affine, affine, atol=1e-9)
    assert (scan.source.modality, scan.source.instances, scan.source.notes) == (modality, (path,), ())


def test_two_echoes_of_an_enhanced_image_are_listed(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    (path,) = save(tmp_path, [make_enhanced(volume, echoes_ms=(8.0, 80.0))])
    with pytest.raises(SeveralSeries, match="2 stacks") as refused:
        read_scan(path)
    late = next(n for n in (1, 2) if f"{UID}/{n} (14 MR slices, axial, echo 80 ms)" in refused.value.advice)
    array = reorient(volume, "axial")[0]
    np.testing.assert_array_equal(read_scan(path, series=f"{UID}/{late}").volume.array, array // 2)
