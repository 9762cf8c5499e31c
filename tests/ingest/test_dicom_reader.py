"""DICOM files: which of them are read, which are refused, and that no patient's value leaves the reader."""

import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread, uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.tag import Tag
from pydicom.uid import MediaStorageDirectoryStorage

from app.dicom_attributes import silence_libraries
from app.errors import (
    CounterpartError,
    InvalidGeometry,
    InvalidHeader,
    IrregularSlices,
    NoImageInArchive,
    NotAVolume,
    SeveralPatients,
    TooManyVoxels,
    TruncatedFile,
    UnsafeArchive,
    UnsupportedPixels,
    WrongModality,
)
from app.ingest.dicom import reader
from app.ingest.dicom.pixels import hash_values
from app.ingest.reader import Limits
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.dicom import SECRET, Series, make_datasets, reorient, save, write_series

Change = Callable[[list[FileDataset]], object]


def test_instances_are_in_slice_order(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    paths = write_series(tmp_path / "s", volume)
    assert paths != sorted(paths)
    assert read_scan(tmp_path / "s").source.instances == tuple(paths)


def test_fractional_values_are_rounded_to_the_stored_step(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    fractional = Volume((volume.array / 7 - 20).astype(np.float32), volume.affine)
    write_series(tmp_path / "s", fractional)
    step = float(np.ptp(fractional.array)) / (2**16 - 1)
    expected = reorient(fractional, "axial")[0]
    np.testing.assert_allclose(read_scan(tmp_path / "s").volume.array, expected, atol=step / 2 + 1e-4)


def test_files_that_are_not_slices_are_left_out_and_counted(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume)
    localizers = make_datasets(volume, Series(name="scout", plane="sagittal"))[:3]
    for dataset in localizers:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    report, screenshot, colour = (make_datasets(volume, Series(name=name))[0] for name in ("report", "shot", "colour"))
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = uid.ComprehensiveSRStorage
    del report.Rows, report.PixelData
    del screenshot.ImagePositionPatient
    colour.SamplesPerPixel, colour.PhotometricInterpretation = 3, "RGB"
    paths = save(tmp_path / "s", [*slices, *localizers, report, screenshot, colour])
    shutil.copy(paths[4], tmp_path / "s" / "copy")
    (tmp_path / "s" / "notes.txt").write_text("hello")
    scan = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(scan.volume.array, reorient(volume, "axial")[0])
    assert scan.source.notes == (
        "Left out: 1 DICOM files without an image.",
        "Left out: 1 colour images.",
        "Left out: 3 localizers.",
        "Left out: 1 screenshots or images without a position.",
        "Left out: 1 duplicates of other files.",
    )


@pytest.mark.parametrize("shared", [range(14), range(6, 8)], ids=["all slices", "two slices"])
def test_slices_with_one_instance_uid_are_not_duplicates(
    tmp_path: Path, read_scan: Read, volume: Volume, shared: range
) -> None:
    slices = make_datasets(volume)
    for k in shared:
        slices[k].SOPInstanceUID = slices[k].file_meta.MediaStorageSOPInstanceUID = uid.UID("1.2.3")
    paths = save(tmp_path / "s", slices)
    shutil.copy(paths[6], tmp_path / "s" / "copy")
    scan = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(scan.volume.array, reorient(volume, "axial")[0])
    assert scan.source.notes[0] == "Left out: 1 duplicates of other files."
    assert scan.source.notes[1].startswith(f"{len(shared) - 1} images have the SOPInstanceUID of another image")


@pytest.mark.parametrize("syntax", [uid.RLELossless, uid.ImplicitVRLittleEndian, uid.JPEG2000Lossless])
def test_one_instance_in_two_transfer_syntaxes_is_a_duplicate(
    tmp_path: Path, read_scan: Read, volume: Volume, syntax: str
) -> None:
    save(tmp_path / "s", make_datasets(volume))
    save(tmp_path / "s" / "encoded", make_datasets(volume, Series(syntax=syntax)))
    scan = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(scan.volume.array, reorient(volume, "axial")[0])
    assert scan.source.notes == ("Left out: 14 duplicates of other files.",)


@pytest.mark.parametrize("change", ["pixel", "rescale"])
def test_one_instance_with_other_values_in_another_transfer_syntax_is_refused(
    tmp_path: Path, read_scan: Read, volume: Volume, change: str
) -> None:
    save(tmp_path / "s", make_datasets(volume))
    other = make_datasets(volume, Series(syntax=uid.ExplicitVRLittleEndian))[6]
    if change == "pixel":
        other.PixelData = other.PixelData[:-2] + b"\1\1"
    else:
        other.RescaleSlope, other.RescaleIntercept = "1", "1"
    other.compress(uid.RLELossless, generate_instance_uid=False)
    other.save_as(tmp_path / "s" / "other")
    with pytest.raises(IrregularSlices, match="2 images"):
        read_scan(tmp_path / "s")


def test_only_files_that_may_be_duplicates_are_decoded_for_it(
    tmp_path: Path, read_scan: Read, volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []

    def count(path: Path) -> bytes | None:
        decoded.append(path)
        return hash_values(path)

    monkeypatch.setattr(reader, "hash_values", count)
    paths = save(tmp_path / "s", make_datasets(volume))
    shutil.copy(paths[2], tmp_path / "s" / "copy")
    encoded = save(tmp_path / "s" / "encoded", make_datasets(volume, Series(syntax=uid.RLELossless))[5:7])
    read_scan(tmp_path / "s")
    assert sorted(decoded) == sorted([*paths[5:7], *encoded])


def test_other_pixels_with_the_same_instance_uid_and_position_are_refused(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    slices = make_datasets(volume)
    save(tmp_path / "s", slices)
    slices[6].PixelData = slices[7].PixelData
    slices[6].save_as(tmp_path / "s" / "other pixels")
    with pytest.raises(IrregularSlices, match="2 images"):
        read_scan(tmp_path / "s")


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("PatientID", "4712"), ("PatientName", "Other^Name"), ("PatientBirthDate", "19000102")],
)
def test_two_patients_in_one_upload_are_refused(
    tmp_path: Path, read_scan: Read, volume: Volume, keyword: str, value: str
) -> None:
    slices = make_datasets(volume)
    for dataset in slices[::2]:
        setattr(dataset, keyword, value)
    save(tmp_path / "s", slices)
    with pytest.raises(SeveralPatients, match=keyword) as refused:
        read_scan(tmp_path / "s")
    assert SECRET not in str(refused.value)
    assert value not in str(refused.value)


def test_spellings_of_one_patient_are_accepted(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume)
    slices[1].PatientName, slices[2].PatientName = f"{SECRET.upper()}^ALBERTA^^", ""
    slices[3].PatientID = slices[4].PatientBirthDate = None
    save(tmp_path / "s", slices)
    assert read_scan(tmp_path / "s").volume.shape == (32, 34, 14)


def test_a_disc_with_its_directory_is_read(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    save(tmp_path / "disc" / "DICOM" / "PAT00001", make_datasets(volume))
    directory = make_datasets(volume)[0]
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
    np.testing.assert_array_equal(scan.volume.array, reorient(volume, "axial")[0])
    assert scan.source.notes == ("Left out: 1 DICOM files without an image.",)


def set_in_all(**values: object) -> Change:
    """Return a change that sets attributes in every slice; None deletes the attribute."""

    def change(slices: list[FileDataset]) -> None:
        for dataset in slices:
            for name, value in values.items():
                delattr(dataset, name) if value is None else setattr(dataset, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "error", "keyword"),
    [
        (set_in_all(Modality="PT"), WrongModality, "PT"),
        (set_in_all(Modality="SECRET"), WrongModality, r"is not MR or CT\."),
        (set_in_all(SamplesPerPixel=3, PhotometricInterpretation="RGB"), NotAVolume, "colour"),
        (set_in_all(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), NotAVolume, "localizers"),
        (set_in_all(ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]), NotAVolume, "mosaics"),
        (set_in_all(ImagePositionPatient=None), InvalidGeometry, "position"),
        (set_in_all(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), InvalidGeometry, "orientation"),
        (set_in_all(ImageOrientationPatient=[0, 0, 0, 0, 0, 0]), InvalidGeometry, "orientation"),
        (set_in_all(PixelSpacing=[0, 1]), InvalidGeometry, "spacing"),
        (set_in_all(Rows=None), NoImageInArchive, "14 DICOM files"),
        (set_in_all(PixelData=None), NoImageInArchive, "Slice 1 of 14"),
        (lambda s: setattr(s[8], "PixelData", bytes(100)), TruncatedFile, "slice 9 of 14"),
        (set_in_all(BitsAllocated=12), TruncatedFile, "slice 1 of 14"),
    ],
)
def test_unsuitable_series_are_refused(
    tmp_path: Path, read_scan: Read, volume: Volume, change: Change, error: type[CounterpartError], keyword: str
) -> None:
    slices = make_datasets(volume)
    change(slices)
    save(tmp_path / "s", slices)
    with pytest.raises(error, match=keyword):
        read_scan(tmp_path / "s")


def test_a_compression_without_a_decoder_is_refused(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume, Series(syntax=uid.RLELossless))
    for dataset in slices:
        dataset.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    save(tmp_path / "s", slices)
    with pytest.raises(UnsupportedPixels, match="MPEG2"):
        read_scan(tmp_path / "s")


# ---- values that are missing or invalid --------------------------------------------------------


def set_raw(keyword: str, vr: str, content: bytes) -> Change:
    """Return a change that sets the bytes of an attribute in every slice."""

    def change(slices: list[FileDataset]) -> None:
        for dataset in slices:
            tag = Tag(keyword)
            dataset._dict[tag] = RawDataElement(tag, vr, len(content), content, 0, False, True)

    return change


def write_bare(folder: Path, slices: list[FileDataset], *, implicit: bool) -> None:
    """Write data sets without preamble and file meta information."""
    folder.mkdir()
    for k, dataset in enumerate(slices):
        buffer = DicomBytesIO()
        buffer.is_implicit_VR, buffer.is_little_endian = implicit, True
        write_dataset(buffer, dataset)
        (folder / str(k)).write_bytes(buffer.getvalue())


@pytest.mark.parametrize("implicit", [True, False])
def test_data_sets_without_file_meta_information_are_read(
    tmp_path: Path, read_scan: Read, volume: Volume, *, implicit: bool
) -> None:
    write_bare(tmp_path / "s", make_datasets(volume), implicit=implicit)
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, reorient(volume, "axial")[0])


def test_compressed_pixels_without_file_meta_information_are_refused(
    tmp_path: Path, read_scan: Read, volume: Volume
) -> None:
    write_bare(tmp_path / "s", make_datasets(volume, Series(syntax=uid.RLELossless)), implicit=False)
    with pytest.raises(UnsupportedPixels, match="no file meta information"):
        read_scan(tmp_path / "s")


@pytest.mark.parametrize(
    ("keyword", "content"),
    [("EchoTime", b"4,6 "), ("EchoTime", b"four"), ("SliceThickness", b"2,0 "), ("SliceThickness", b"n/a ")],
)
def test_optional_values_may_be_invalid(
    tmp_path: Path, read_scan: Read, volume: Volume, keyword: str, content: bytes
) -> None:
    slices = make_datasets(volume)
    set_raw(keyword, "DS", content)(slices)
    with silence_libraries():
        paths = save(tmp_path / "s", slices)
        scan = read_scan(tmp_path / "s")
    assert content in paths[0].read_bytes()
    np.testing.assert_array_equal(scan.volume.array, reorient(volume, "axial")[0])


def test_pixel_spacing_may_be_a_text(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume)
    content = "\\".join(f"{v:.8f}" for v in slices[0].PixelSpacing).encode()
    set_raw("PixelSpacing", "UT", content)(slices)
    save(tmp_path / "s", slices)
    scan = read_scan(tmp_path / "s")
    np.testing.assert_allclose(scan.volume.affine, reorient(volume, "axial")[1], atol=1e-6)


@pytest.mark.parametrize("keyword", ["PhotometricInterpretation", "SamplesPerPixel"])
def test_attributes_with_one_possible_value_may_be_missing(
    tmp_path: Path, read_scan: Read, volume: Volume, keyword: str
) -> None:
    slices = make_datasets(volume)
    set_in_all(**{keyword: None})(slices)
    save(tmp_path / "s", slices)
    np.testing.assert_array_equal(read_scan(tmp_path / "s").volume.array, reorient(volume, "axial")[0])


@pytest.mark.parametrize("keyword", ["PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"])
@pytest.mark.parametrize("count", [1, 14])
def test_positions_with_a_decimal_comma_are_refused_with_their_name(
    tmp_path: Path, read_scan: Read, volume: Volume, keyword: str, count: int
) -> None:
    slices = make_datasets(volume)
    set_raw(keyword, "DS", b"2,0\\2,0")(slices[-count:])
    with silence_libraries():
        save(tmp_path / "s", slices)
    with pytest.raises(InvalidGeometry, match=f"{keyword} of {count} of 14 images is not a list of numbers"):
        read_scan(tmp_path / "s")


def test_a_slice_of_the_series_without_a_position_is_refused(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    slices = make_datasets(volume)
    del slices[13].ImagePositionPatient
    save(tmp_path / "s", slices)
    with pytest.raises(InvalidGeometry, match="1 of 14 images of the series do not state their position"):
        read_scan(tmp_path / "s")
    assert read_scan(tmp_path / "s", geometry="resample").source.notes == (
        "Left out: 1 screenshots or images without a position.",
    )


@pytest.mark.parametrize("count", [1, 14])
def test_a_ct_without_rescale_is_refused(tmp_path: Path, read_scan: Read, volume: Volume, count: int) -> None:
    slices = make_datasets(volume, Series(modality="CT", rescale=(1.0, 0.0)))
    set_in_all(RescaleSlope=None, RescaleIntercept=None)(slices[:count])
    save(tmp_path / "s", slices)
    with pytest.raises(InvalidHeader, match=f"{count} of 14 CT slices have no RescaleSlope and RescaleIntercept"):
        read_scan(tmp_path / "s")


def test_a_ct_without_rescale_is_read_if_its_values_reach_air(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    hounsfield = Volume(volume.array - 1000, volume.affine)
    slices = make_datasets(hounsfield, Series(modality="CT", rescale=(1.0, 0.0)))
    set_in_all(RescaleSlope=None, RescaleIntercept=None)(slices)
    save(tmp_path / "s", slices)
    scan = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(scan.volume.array, reorient(hounsfield, "axial")[0])
    assert scan.source.notes[0].startswith("The CT states no rescale.")


# ---- limits and privacy ------------------------------------------------------------------------


def test_too_many_voxels_are_refused(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    write_series(tmp_path / "s", volume)
    with pytest.raises(TooManyVoxels, match="15232"):
        read_scan(tmp_path / "s", limits=Limits(max_voxels=15_231))


def test_a_deflated_bomb_is_refused(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    (dataset,) = make_datasets(volume, Series(syntax=uid.DeflatedExplicitVRLittleEndian))[:1]
    dataset.PixelData = bytes(3_000_000)
    (bomb,) = save(tmp_path / "bomb", [dataset])
    assert bomb.stat().st_size < 10_000
    with pytest.raises(UnsafeArchive):
        read_scan(bomb, limits=Limits(max_inflated_bytes=1_000_000))


def test_no_value_of_the_patient_leaves_the_reader(
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
        with pytest.raises((TruncatedFile, InvalidGeometry)) as refused:
            read_scan(tmp_path / "good")
        texts.append(f"{refused.value}{refused.value!r}{refused.value.__cause__!r}")
        paths[3].write_bytes(whole)
    assert not any(SECRET in text for text in texts)
    assert SECRET not in caplog.text
    assert capfd.readouterr() == ("", "")
