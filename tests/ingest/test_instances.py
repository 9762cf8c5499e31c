"""Single instances for DICOMweb whose files are unusual, and which the reader accepts."""

from pathlib import Path

import pydicom
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian

from app.ingest.dicom.instances import identify, read_attributes, read_frames
from tests.support.dicom import make_datasets
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
