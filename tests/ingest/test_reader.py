import nibabel as nib
import numpy as np
import pytest

from app.errors import EmptyUpload, NotAnImageFormat
from app.ingest.reader import HEAD_BYTES, detect_format


def nifti_bytes(kind: type[nib.Nifti1Image] = nib.Nifti1Image, order: str = "<") -> bytes:
    header = kind.header_class(endianness=order)
    header.set_data_shape((3, 4, 5))
    return bytes(kind(np.ones((3, 4, 5), np.int16), np.eye(4), header).to_bytes())


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti_of_both_versions_and_byte_orders(kind: type[nib.Nifti1Image], order: str) -> None:
    assert detect_format(nifti_bytes(kind, order)[:HEAD_BYTES]) == "nifti"


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\x1f\x8b\x08\x00rest", "gzip"),
        (b"PK\x03\x04rest", "zip"),
        (b"PK\x05\x06" + b"\0" * 18, "zip"),
        (b"\0" * 128 + b"DICM\x02\0", "dicom"),
        (b"\x08\0\x05\0CS\x0a\0ISO_IR 100", "dicom"),
    ],
)
def test_other_signatures(head: bytes, expected: str) -> None:
    assert detect_format(head) == expected


def test_a_header_cut_short_is_still_a_nifti() -> None:
    assert detect_format(nifti_bytes()[:200]) == "nifti"


@pytest.mark.parametrize(
    "head",
    [
        b"dear doctor, please find attached",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"\0" * HEAD_BYTES,
        b"x",
        nifti_bytes()[:344] + b"\0\0\0\0",  # Analyze 7.5 has the size and no magic
    ],
)
def test_what_is_no_image_format(head: bytes) -> None:
    with pytest.raises(NotAnImageFormat):
        detect_format(head)


def test_a_header_without_its_voxels_says_how_to_mend_it() -> None:
    with pytest.raises(NotAnImageFormat, match=r"\.hdr and \.img"):
        detect_format(nifti_bytes()[:344] + b"ni1\0")


def test_nothing() -> None:
    with pytest.raises(EmptyUpload):
        detect_format(b"")
