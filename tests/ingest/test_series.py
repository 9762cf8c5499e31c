"""Selection of one stack among many frames."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import FileDataset

from app.errors import IrregularSlices, NotAVolume, SeveralSeries, UnknownSeries
from app.volume import Scan, Volume
from tests.ingest.conftest import Read
from tests.support.dicom import SECRET, Series, make_datasets, reorient, save, series_uid, write_series
from tests.support.enhanced import make_enhanced
from tests.support.geometry import OBLIQUE, SPACING, make_affine

UID = series_uid(Series())
PLACE, SAGITTAL_PLACE = "axial, z -42 to -16 mm", "sagittal, x -17 to 11 mm"
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
    names = {x: name for name in listed for x in labels if f"{name} (14 MR slices, axial, {x}, " in advice}
    assert set(names) == set(labels)
    array = reorient(volume, "axial")[0]
    np.testing.assert_array_equal(read_scan(tmp_path / "s", series=names[labels[0]]).volume.array, array)
    np.testing.assert_array_equal(read_scan(tmp_path / "s", series=names[labels[1]]).volume.array, array.max() - array)
    with pytest.raises(SeveralSeries):
        read_scan(tmp_path / "s", series=UID)
    with pytest.raises(UnknownSeries):
        read_scan(tmp_path / "s", series=f"{UID}/3")


@pytest.mark.parametrize(
    ("types", "labels"),
    [
        ((["W", "W", "FFE"], ["IP", "IP", "FFE"]), ("water", "in phase")),
        ((["M", "DIXON", "FAT"], ["M", "DIXON", "OPP_PHASE"]), ("fat", "out of phase")),
        ((["M", "ND", "A"], ["M", "ND", "B"]), ("", "")),
    ],
    ids=["Philips", "Siemens", "unknown"],
)
def test_contrasts_of_one_series_are_listed(
    tmp_path: Path, read_scan: Read, volume: Volume, types: tuple[list[str], list[str]], labels: tuple[str, str]
) -> None:
    slices = make_datasets(volume)
    for dataset in slices:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", *types[0]]
    others = make_negative(volume, lambda d: setattr(d, "ImageType", ["ORIGINAL", "PRIMARY", *types[1]]))
    save(tmp_path / "s", [*slices, *others])
    with pytest.raises(SeveralSeries, match="2 stacks") as refused:
        read_scan(tmp_path / "s")
    for label in filter(None, labels):
        assert f"(14 MR slices, axial, {label}, " in refused.value.advice
    found = [read_scan(tmp_path / "s", series=f"{UID}/{n}").volume.array for n in (1, 2)]
    array = reorient(volume, "axial")[0]
    for expected in (array, array.max() - array):
        assert any(np.array_equal(expected, one) for one in found)


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
    assert scan.source.notes == (f"Left out: 1 phase, real or imaginary stacks (14 slices, {PLACE}).",)


def test_acquired_series_are_preferred_to_derived_ones(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    reformatted = make_datasets(volume, Series(name="reformatted", plane="sagittal"))
    for dataset in reformatted:
        dataset.ImageType = ["DERIVED", "PRIMARY", "MPR"]
    save(tmp_path / "s", reformatted)
    alone = read_scan(tmp_path / "s")
    assert "DERIVED" in alone.source.notes[0]
    save(tmp_path / "s" / "2", make_datasets(volume))
    scan = read_scan(tmp_path / "s")
    assert (scan.source.series_uid, scan.source.notes) == (
        UID,
        (f"Left out: 1 derived stacks (32 slices, {SAGITTAL_PLACE}).",),
    )


def test_a_volume_is_preferred_to_a_time_series(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    functional = [dataset for name in "ab" for dataset in make_datasets(volume, Series(name=name))]
    for dataset in functional:
        dataset.SeriesInstanceUID = "1.2.3"
    save(tmp_path / "s" / "1", functional)
    with pytest.raises(NotAVolume, match="2 images at each of 14 positions"):
        read_scan(tmp_path / "s")
    save(tmp_path / "s" / "2", make_datasets(volume))
    scan = read_scan(tmp_path / "s")
    assert (scan.source.series_uid, scan.source.notes) == (UID, (f"Left out: 1 time series (28 slices, {PLACE}).",))
    with pytest.raises(NotAVolume):
        read_scan(tmp_path / "s", series="1.2.3")


def test_two_orientations_in_one_series_are_listed(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    sagittal = make_datasets(volume, Series(name="other", plane="sagittal"))
    for dataset in sagittal:
        dataset.SeriesInstanceUID = UID
    save(tmp_path / "s", [*make_datasets(volume), *sagittal])
    with pytest.raises(SeveralSeries) as refused:
        read_scan(tmp_path / "s")
    assert f"{UID}/1 (32 MR slices, sagittal, " in refused.value.advice
    assert f"; {UID}/2 (14 MR slices, axial, " in refused.value.advice
    assert read_scan(tmp_path / "s", series=f"{UID}/2").volume.shape == reorient(volume, "axial")[0].shape


def test_two_modalities_in_one_series_are_listed(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume)
    for dataset in slices[::2]:
        dataset.Modality = "CT"
    save(tmp_path / "s", slices)
    with pytest.raises(SeveralSeries, match=r"7 MR slices.*7 CT slices|7 CT slices.*7 MR slices"):
        read_scan(tmp_path / "s")


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
    assert f"{series_uid(one)} (14 MR slices, axial, 2 mm thick, T1, series 1, MPRAGE); " in refused.value.advice
    assert f"{series_uid(two)} (14 CT slices, axial, 2 mm thick, series 1, MPRAGE)." in refused.value.advice
    assert read_scan(tmp_path / "s", series=series_uid(two)).source.modality == "CT"
    with pytest.raises(UnknownSeries, match=series_uid(one)):
        read_scan(tmp_path / "s", series="1.2.3")


def test_a_few_slices_beside_a_stack_are_left_out(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    save(tmp_path / "s" / "1", make_datasets(volume))
    save(tmp_path / "s" / "2", make_datasets(volume, Series(name="key images"))[:9])
    scan = read_scan(tmp_path / "s")
    assert scan.source.series_uid == UID
    (note,) = scan.source.notes
    assert note.startswith("Left out: 1 stacks of fewer than 10 slices (9 slices, axial, z ")


def test_a_list_of_series_has_at_most_ten_entries(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    for i in range(12):
        save(tmp_path / "s" / str(i), make_datasets(volume, Series(name=str(i)))[:1])
    with pytest.raises(SeveralSeries) as refused:
        read_scan(tmp_path / "s")
    assert refused.value.advice.count("(1 MR slices, axial, ") == 10
    assert refused.value.advice.endswith("and 2 more.")


# ---- blocks of slices --------------------------------------------------------------------------


def read_slices(read_scan: Read, folder: Path, slices: list[FileDataset], **options: object) -> Scan:
    """Write slices and read them."""
    save(folder, slices)
    return read_scan(folder, **options)


def turn(dataset: FileDataset, degrees: float) -> None:
    """Turn an axial slice in its plane about its first pixel."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    dataset.ImageOrientationPatient = [f"{v:.8f}" for v in (c, s, 0, -s, c, 0)]


def crop(dataset: FileDataset) -> None:
    """Reduce the field of view of a slice by two columns."""
    pixels = dataset.pixel_array[:, :-2]
    dataset.Columns, dataset.PixelData = pixels.shape[1], pixels.tobytes()


def tilt(dataset: FileDataset) -> None:
    """Tilt an axial slice by 8 degrees about its first row."""
    c, s = np.cos(np.radians(8)), np.sin(np.radians(8))
    dataset.ImageOrientationPatient = [f"{v:.8f}" for v in (1, 0, 0, 0, c, s)]


@pytest.mark.parametrize("geometry", ["refuse", "resample"])
def test_orientations_that_jitter_are_one_stack(tmp_path: Path, read_scan: Read, volume: Volume, geometry: str) -> None:
    slices = make_datasets(volume)
    for dataset in slices[::4]:
        turn(dataset, 0.07)
    scan = read_slices(read_scan, tmp_path / "s", slices, geometry=geometry)
    array, affine = reorient(volume, "axial")
    np.testing.assert_array_equal(scan.volume.array, array)
    np.testing.assert_allclose(scan.volume.affine, affine, atol=1e-9)
    (note,) = scan.source.notes
    assert note.startswith("4 of 14 slices differ from the others in orientation, by at most 0.07 degrees.")


def test_slices_that_are_turned_too_far_are_not_called_missing(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume)
    for dataset in slices[2::5]:
        turn(dataset, 0.5)
    save(tmp_path / "s", slices)
    for geometry in ("refuse", "resample"):
        with pytest.raises(SeveralSeries, match="3 slices, axial"):
            read_scan(tmp_path / "s", geometry=geometry)


@pytest.mark.parametrize("count", [14, 3])
def test_frames_of_reference_that_differ_are_joined_to_one_stack(
    tmp_path: Path, read_scan: Read, volume: Volume, count: int
) -> None:
    slices = make_datasets(volume)
    for k, dataset in enumerate(slices[-count:]):
        dataset.FrameOfReferenceUID = f"1.2.{k if count == 14 else 0}"
    scan = read_slices(read_scan, tmp_path / "s", slices)
    np.testing.assert_array_equal(scan.volume.array, reorient(volume, "axial")[0])
    assert scan.source.notes[0].startswith(f"The slices state {14 if count == 14 else 2} frames of reference")


def test_a_missing_slice_is_found_among_frames_of_reference_that_differ(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    slices = make_datasets(volume)
    for k, dataset in enumerate(slices):
        dataset.FrameOfReferenceUID = f"1.2.{k}"
    del slices[4]
    with pytest.raises(IrregularSlices, match="Slice 5 of 14 is missing"):
        read_slices(read_scan, tmp_path / "s", slices)


def test_slices_with_a_series_each_are_one_stack(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume)
    for k, dataset in enumerate(slices):
        dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = f"1.2.{k}", f"1.3.{k}"
    scan = read_slices(read_scan, tmp_path / "s", slices)
    np.testing.assert_array_equal(scan.volume.array, reorient(volume, "axial")[0])
    assert scan.source.notes[0].startswith("The 14 slices state 14 series")


@pytest.mark.parametrize("change", [crop, tilt], ids=["field of view", "tilt"])
@pytest.mark.parametrize("series", [UID, "1.2.3"], ids=["same series", "other series"])
@pytest.mark.parametrize("block", [slice(0, 3), slice(11, 14)], ids=["below", "above"])
def test_a_block_that_continues_the_stack_is_not_left_out(
    tmp_path: Path, read_scan: Read, volume: Volume, change: Change, series: str, block: slice
) -> None:
    slices = make_datasets(volume)
    for dataset in slices[block]:
        change(dataset)
        dataset.SeriesInstanceUID = series
    save(tmp_path / "s", slices)
    for geometry in ("refuse", "resample"):
        with pytest.raises(SeveralSeries, match=r"outside it: 3 slices, axial, z -?\d+ to") as refused:
            read_scan(tmp_path / "s", geometry=geometry)
    name = f"{UID}/1" if series == UID else UID
    assert f"{name} (11 MR slices, axial, " in refused.value.advice
    assert read_scan(tmp_path / "s", series=name).volume.shape[2] == 11


def test_a_scout_that_crosses_the_stack_is_left_out(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    scout = make_datasets(volume, Series(name="scout", plane="sagittal"))[14:17]
    for dataset in scout:
        dataset.SeriesInstanceUID = UID
    scan = read_slices(read_scan, tmp_path / "s", [*make_datasets(volume), *scout])
    np.testing.assert_array_equal(scan.volume.array, reorient(volume, "axial")[0])
    (note,) = scan.source.notes
    assert note.startswith("Left out: 1 stacks of fewer than 10 slices (3 slices, sagittal, x ")


# ---- which of several series -------------------------------------------------------------------


def make_series(volume: Volume, name: str, description: str, **values: object) -> list[FileDataset]:
    """Return a series with a description and other attributes."""
    slices = make_datasets(volume, Series(name=name, description=description))
    for dataset in slices:
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
    return slices


DERIVED = ["DERIVED", "PRIMARY", "M", "DIS3D"]


def test_the_sequence_of_a_model_is_preferred_to_an_acquired_series(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    corrected = make_series(volume, "one", "t1_mprage_sag", ImageType=DERIVED)
    with_agent = make_series(volume, "agent", "t1_tse_tra_km", ContrastBolusAgent="Gadovist")
    other = make_series(volume, "other", "t2_tse_tra")
    save(tmp_path / "s", [*corrected, *with_agent, *other])
    scan = read_scan(tmp_path / "s", sequences={"T1"})
    assert scan.source.series_uid == series_uid(Series(name="one"))
    assert scan.source.notes[0].startswith(
        "Left out: 2 stacks of another sequence or contrast agent than a model's (14 slices"
    )
    assert read_scan(tmp_path / "s", sequences={"T1c"}).source.series_uid == series_uid(Series(name="agent"))


def test_a_derived_series_of_the_sequence_is_listed_beside_acquired_ones(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    kinds = {"INV1": ["ORIGINAL", "PRIMARY"], "INV2": ["ORIGINAL", "PRIMARY"], "UNI_Images": DERIVED}
    for number, (kind, image_type) in enumerate(kinds.items(), 5):
        slices = make_series(volume, kind, f"t1_mp2rage_sag_{kind}", ImageType=image_type, SeriesNumber=number)
        save(tmp_path / "s" / kind, slices)
    with pytest.raises(SeveralSeries, match="3 MR or CT series") as refused:
        read_scan(tmp_path / "s", sequences={"T1"})
    for words in ("series 5, first inversion", "series 6, second inversion", "series 7, uniform"):
        assert words in refused.value.advice


def test_a_reformatted_series_of_the_sequence_is_left_out(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    cut = make_series(volume, "cut", "t1_mprage", ImageType=["DERIVED", "SECONDARY", "MPR"])
    save(tmp_path / "s", [*make_datasets(volume), *cut])
    assert read_scan(tmp_path / "s", sequences={"T1"}).source.series_uid == UID


def test_reconstructions_of_a_ct_are_told_apart_without_free_text(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    for number, (kernel, name) in enumerate((("H30s", "Head soft"), ("H70h", "Head bone"), (SECRET, SECRET)), 2):
        slices = make_datasets(volume, Series(modality="CT", name=str(number), description=name))
        for dataset in slices:
            dataset.ConvolutionKernel, dataset.SeriesNumber = kernel, number
        save(tmp_path / "s" / str(number), slices)
    with pytest.raises(SeveralSeries) as refused:
        read_scan(tmp_path / "s")
    advice = refused.value.advice
    assert "2 mm thick, series 2, kernel H30s, soft tissue)" in advice
    assert "2 mm thick, series 3, kernel H70h, bone)" in advice
    assert "2 mm thick, series 4)" in advice
    assert SECRET not in str(refused.value)


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
    late = next(n for n in (1, 2) if f"{UID}/{n} (14 MR slices, axial, echo 80 ms, " in refused.value.advice)
    array = reorient(volume, "axial")[0]
    np.testing.assert_array_equal(read_scan(path, series=f"{UID}/{late}").volume.array, array // 2)
