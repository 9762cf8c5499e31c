import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from pydicom import dcmread, uid
from pydicom.dataset import Dataset, FileDataset

from app.errors import (
    CounterpartError,
    InvalidGeometry,
    NoImageInArchive,
    NotAVolume,
    SeveralSeries,
    TooManyVoxels,
    TruncatedFile,
    UnknownSeries,
    UnsafeArchive,
    UnsupportedPixels,
    WrongModality,
)
from app.ingest.reader import Limits
from app.volume import Volume
from tests.ingest.conftest import Read, centroid_mm, placed
from tests.support.dicom import SECRET, Plane, Series, datasets, save, scanned, series_uid, write_series

OBLIQUE = (0.2, -0.35, 0.5)
SYNTAXES = [
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.DeflatedExplicitVRLittleEndian,
    uid.RLELossless,
    uid.JPEGLSLossless,
    uid.JPEG2000Lossless,
]
Change = Callable[[list[FileDataset]], object]


@pytest.mark.parametrize(
    ("angles", "modality"), [((0.0, 0.0, 0.0), "CT"), (OBLIQUE, "MR")], ids=["straight CT", "oblique MR"]
)
@pytest.mark.parametrize("plane", get_args(Plane))
def test_voxels_and_place_come_back(
    tmp_path: Path, read_scan: Read, volume: Volume, plane: Plane, angles: tuple[float, float, float], modality: str
) -> None:
    turned = Volume(volume.array, placed((0.9, 1.1, 2.0), angles))
    paths = write_series(tmp_path / "s", turned, Series(plane=plane, modality=modality))  # type: ignore[arg-type]
    assert paths != sorted(paths)  # names have nothing to do with the order
    scan = read_scan(tmp_path / "s")
    array, affine = scanned(turned, plane)
    np.testing.assert_array_equal(scan.volume.array, array)
    np.testing.assert_allclose(scan.volume.affine, affine, atol=1e-9)
    np.testing.assert_allclose(centroid_mm(scan.volume), centroid_mm(turned), atol=1e-9)
    assert scan.source.instances == tuple(paths)
    assert (scan.source.modality, scan.source.notes) == (modality, ())


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda s: s.name)
def test_every_encoding_gives_the_same_voxels(tmp_path: Path, read_scan: Read, volume: Volume, syntax: str) -> None:
    write_series(tmp_path / "s", volume, Series(syntax=syntax))
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, scanned(volume, "axial")[0])


def test_values_that_are_no_integers(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    fine = Volume((volume.array / 7 - 20).astype(np.float32), volume.affine)
    write_series(tmp_path / "s", fine)
    scan = read_scan(tmp_path / "s")
    step = float(np.ptp(fine.array)) / (2**16 - 1)
    np.testing.assert_allclose(scan.volume.array, scanned(fine, "axial")[0], atol=step / 2 + 1e-4)


def test_an_inverted_mr_is_turned_over(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    write_series(tmp_path / "s", volume, Series(photometric="MONOCHROME1"))
    scan = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(scan.volume.array, scanned(volume, "axial")[0])
    assert "MONOCHROME1" in scan.source.notes[0]


@pytest.mark.parametrize("value", [-2000, 2**16 - 2000])  # signed, and the same bits read as unsigned
def test_padding_becomes_background(tmp_path: Path, read_scan: Read, volume: Volume, value: int) -> None:
    slices = datasets(volume, Series(modality="CT"))
    for dataset in slices:
        pixels = dataset.pixel_array.copy()
        pixels[:5, :] = -2000
        dataset.PixelData = pixels.tobytes()
        dataset.add_new("PixelPaddingValue", "US" if value > 0 else "SS", value)
    save(tmp_path / "s", slices)
    scan = read_scan(tmp_path / "s")
    expected = scanned(volume, "axial")[0].copy()
    expected[:, :5] = expected[:, 5:].min()
    np.testing.assert_array_equal(scan.volume.array, expected)
    assert scan.source.notes == (f"{32 * 5 * 14} padding pixels were set to the smallest value of the image.",)


def test_a_modality_look_up_table(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    table = (np.arange(4096) ** 2 % 60_000).astype(np.uint16)
    slices = datasets(volume)
    for dataset in slices:
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [4096, 0, 16])
        item.ModalityLUTType = "US"
        item.add_new("LUTData", "US", table.tolist())
        dataset.ModalityLUTSequence = [item]
    save(tmp_path / "s", slices)
    expected = table[scanned(volume, "axial")[0].astype(int)]
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, expected)


# ---- which files, which series -----------------------------------------------------------------


def test_files_that_are_no_slices_are_left_out_and_counted(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = datasets(volume)
    localizers = datasets(volume, Series(name="scout", plane="sagittal"))[:3]
    for dataset in localizers:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    report, screenshot, colour = (datasets(volume, Series(name=name))[0] for name in ("report", "shot", "colour"))
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = uid.ComprehensiveSRStorage
    del report.Rows, report.PixelData
    del screenshot.ImagePositionPatient
    colour.SamplesPerPixel, colour.PhotometricInterpretation = 3, "RGB"
    paths = save(tmp_path / "s", [*slices, *localizers, report, screenshot, colour])
    shutil.copy(paths[4], tmp_path / "s" / "copy")
    (tmp_path / "s" / "notes.txt").write_text("hello")
    scan = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(scan.volume.array, scanned(volume, "axial")[0])
    assert scan.source.notes == (
        "Left out: 1 DICOM files without an image.",
        "Left out: 1 colour images.",
        "Left out: 3 localizers.",
        "Left out: 1 screenshots or images without a position.",
        "Left out: 1 duplicates of other files.",
    )


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


def test_a_few_slices_beside_a_stack_do_not_compete(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    save(tmp_path / "s" / "1", datasets(volume))
    save(tmp_path / "s" / "2", datasets(volume, Series(name="key images"))[:9])
    scan = read_scan(tmp_path / "s")
    assert scan.source.series_uid == series_uid(Series())
    assert scan.source.notes == ("Left out: 1 stacks of fewer than 10 slices.",)


def test_a_list_of_series_ends(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    for i in range(12):
        save(tmp_path / "s" / str(i), datasets(volume, Series(name=str(i)))[:1])
    with pytest.raises(SeveralSeries) as refused:
        read_scan(tmp_path / "s")
    assert refused.value.advice.count("(1 MR slices, axial)") == 10
    assert refused.value.advice.endswith("and 2 more.")


def every(**values: object) -> Change:
    """Set attributes in every slice; None deletes."""

    def change(slices: list[FileDataset]) -> None:
        for dataset in slices:
            for name, value in values.items():
                delattr(dataset, name) if value is None else setattr(dataset, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (every(Modality="PT"), WrongModality, "not MR or CT but PT"),
        (every(Modality="SECRET"), WrongModality, r"not MR or CT\."),
        (every(SamplesPerPixel=3, PhotometricInterpretation="RGB"), NotAVolume, "in colour"),
        (every(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), NotAVolume, "are localizers"),
        (every(ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]), NotAVolume, "Siemens mosaics"),
        (every(ImagePositionPatient=None), InvalidGeometry, "states its position"),
        (every(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), InvalidGeometry, "orientation"),
        (every(ImageOrientationPatient=[0, 0, 0, 0, 0, 0]), InvalidGeometry, "orientation"),
        (every(PixelSpacing=[0, 1]), InvalidGeometry, "spacing"),
        (every(Rows=None), NoImageInArchive, "None of 14 DICOM files holds an image"),
        (every(PixelData=None), NoImageInArchive, "Slice 1 of 14 has an image's header and no pixel data"),
        (lambda s: setattr(s[8], "PixelData", bytes(100)), TruncatedFile, "slice 9 of 14"),
        (every(BitsAllocated=12), TruncatedFile, "slice 1 of 14"),
    ],
)
def test_what_is_no_scan(
    tmp_path: Path, read_scan: Read, volume: Volume, change: Change, error: type[CounterpartError], message: str
) -> None:
    slices = datasets(volume)
    change(slices)
    save(tmp_path / "s", slices)
    with pytest.raises(error, match=message):
        read_scan(tmp_path / "s")


def test_a_compression_without_a_decoder(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = datasets(volume, Series(syntax=uid.RLELossless))
    for dataset in slices:
        dataset.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    save(tmp_path / "s", slices)
    with pytest.raises(UnsupportedPixels, match="MPEG2"):
        read_scan(tmp_path / "s")


def test_limits(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    paths = write_series(tmp_path / "s", volume)
    with pytest.raises(TooManyVoxels, match="15232 voxels"):
        read_scan(tmp_path / "s", limits=Limits(max_voxels=15_231))
    with pytest.raises(UnsafeArchive, match="more than 13 files"):
        read_scan(tmp_path / "s", limits=Limits(max_files=13))
    (dataset,) = datasets(volume, Series(syntax=uid.DeflatedExplicitVRLittleEndian))[:1]
    dataset.PixelData = bytes(3_000_000)
    (bomb,) = save(tmp_path / "bomb", [dataset])
    assert bomb.stat().st_size < 10_000 < len(paths) * 1000
    with pytest.raises(UnsafeArchive, match="deflated DICOM file inflates to more than 1 MB"):
        read_scan(bomb, limits=Limits(max_inflated_bytes=1_000_000))


# ---- nothing of the patient --------------------------------------------------------------------


def test_nothing_of_the_patient_leaves_the_reader(
    tmp_path: Path,
    read_scan: Read,
    volume: Volume,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    paths = write_series(tmp_path / "good", volume)
    scan = read_scan(tmp_path / "good")
    assert SECRET not in repr(scan.source.notes)
    whole, texts = paths[3].read_bytes(), []
    for tag in ("Rows", "ImagePositionPatient", "PixelSpacing", "NumberOfFrames"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            broken = dcmread(paths[3])
            broken.add_new(tag, "LO", SECRET)
            broken.save_as(paths[3])
        with pytest.raises(TruncatedFile) as refused:
            read_scan(tmp_path / "good")
        texts.append(f"{refused.value}{refused.value!r}{refused.value.__cause__!r}")
        paths[3].write_bytes(whole)
    assert not any(SECRET in text for text in texts)
    assert SECRET not in caplog.text
    assert capfd.readouterr() == ("", "")


def test_mutated_files_end_in_an_error_of_ours(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    (path,) = save(tmp_path / "s", datasets(volume)[:1])
    content = path.read_bytes()
    rng = np.random.default_rng(5)
    outcomes = set()
    for _ in range(60):
        broken = bytearray(content)
        for at in rng.integers(132, len(content) - 2176, rng.integers(1, 12)):
            broken[at] = rng.integers(256)
        path.write_bytes(broken)
        try:
            read_scan(path)
        except CounterpartError as error:
            outcomes.add(error.code)
    assert len(outcomes) >= 3
