"""Single instances for DICOMweb whose files are unusual, and which the reader accepts."""

import tracemalloc
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from app.ingest.dicom.instances import UID_BYTES, identify, read_attributes, read_frames
from tests.support.dicom import Series, make_datasets, save
from tests.support.phantom import brain


def write_without_transfer_syntax(path: Path) -> pydicom.Dataset:
    """Write an explicit VR image whose file meta information states no transfer syntax."""
    dataset = make_datasets(brain())[0]
    content = DicomBytesIO()
    content.is_little_endian, content.is_implicit_VR = True, False
    content.write(bytes(128) + b"DICM")
    del dataset.file_meta.TransferSyntaxUID
    write_file_meta_info(content, dataset.file_meta, enforce_standard=False)
    write_dataset(content, dataset)
    path.write_bytes(content.getvalue())
    return dataset


def test_image_without_a_stated_transfer_syntax_has_attributes_and_frames(tmp_path: Path) -> None:
    dataset = write_without_transfer_syntax(tmp_path / "image")
    assert identify(tmp_path / "image") is not None
    attributes = read_attributes(tmp_path / "image")
    assert attributes["00080018"]["Value"] == [dataset.SOPInstanceUID]
    assert attributes["00083002"]["Value"] == [ExplicitVRLittleEndian]
    syntax, frames = read_frames(tmp_path / "image", [1])
    assert (syntax, frames) == (ExplicitVRLittleEndian, [dataset.PixelData])


def deflate(folder: Path, inflated_mib: int, *, uids_last: bool = False) -> Path:
    """Write a deflated image whose inflated pixels, or a value before its UIDs, are zeros."""
    (dataset,) = make_datasets(brain(), Series(syntax=DeflatedExplicitVRLittleEndian))[:1]
    zeros = bytes(inflated_mib << 20)
    if uids_last:
        dataset.private_block(0x0009, "zeros", create=True).add_new(0x01, "OB", zeros)
    else:
        dataset.PixelData = zeros
    (path,) = save(folder, [dataset])
    return path


def test_a_large_deflated_image_is_identified_from_its_first_megabytes(tmp_path: Path) -> None:
    path = deflate(tmp_path, 60)
    tracemalloc.start()
    try:
        instance = identify(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert instance is not None
    assert instance.is_image
    assert peak < 4 * UID_BYTES


def test_a_deflated_image_that_inflates_to_many_times_its_size_is_not_identified(tmp_path: Path) -> None:
    assert identify(deflate(tmp_path, 65)) is None


def test_a_deflated_image_whose_uids_are_too_far_from_its_start_is_not_identified(tmp_path: Path) -> None:
    assert identify(deflate(tmp_path / "near", 2, uids_last=True)) is not None
    assert identify(deflate(tmp_path / "far", 5, uids_last=True)) is None


def test_nan_and_infinities_are_empty_values_in_json(tmp_path: Path) -> None:
    (dataset,) = make_datasets(brain())[:1]
    item = Dataset()
    item.DiffusionBValue, item.DiffusionGradientOrientation = float("nan"), [float("-inf"), 0.5, float("inf")]
    dataset.MRDiffusionSequence = [item]
    dataset.DiffusionBValue = 1000.0
    (path,) = save(tmp_path, [dataset])
    document = read_attributes(path)
    assert document["00189087"] == {"vr": "FD", "Value": [1000.0]}
    assert document["00189117"]["Value"] == [
        {"00189087": {"vr": "FD"}, "00189089": {"vr": "FD", "Value": [None, 0.5, None]}}
    ]
