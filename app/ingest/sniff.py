"""What a file is, by its first bytes; its name decides nothing."""

import struct
from typing import Literal

from app.errors import EmptyUpload, NotAnImageFormat

Format = Literal["nifti", "mgh", "gzip", "zip", "dicom"]

# A NIfTI-2 header without its extension flag; every other signature lies inside it.
HEAD_BYTES = 540

_NIFTI1_BYTES, _NIFTI1_MAGIC_AT = 348, 344
_NIFTI2_BYTES = 540
_NIFTI1_MAGIC = b"n+1\0"
_NIFTI2_MAGIC = b"n+2\0\r\n\x1a\n"
_PAIR_MAGICS = (b"ni1\0", b"ni2\0")
_DICOM_MAGIC, _DICOM_MAGIC_AT = b"DICM", 128
_GZIP_MAGIC = b"\x1f\x8b"
# Local file header, end of an empty archive, marker of a split one.
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
# The first element of a data set stored without its preamble: group 0002 or 0008, little endian.
_DICOM_FIRST_GROUPS = (0x0002, 0x0008)
_DICOM_FIRST_ELEMENTS = 0x0020

# MGH has no magic: a version of 1, four lengths, and one of its types of numbers, all big endian.
_MGH_VERSION, _MGH_BYTES, _MGH_TYPES = 1, 24, (0, 1, 3, 4, 10)

ACCEPTED = "a NIfTI (.nii, .nii.gz) or FreeSurfer (.mgh, .mgz) file, a DICOM file, or a zip of a DICOM series."


def sniff(head: bytes) -> Format:
    """Name the format of a file.

    Parameters
    ----------
    head : bytes
        Its first `HEAD_BYTES` bytes, or all of a shorter file.

    Raises
    ------
    EmptyUpload
        There is nothing.
    NotAnImageFormat
        No signature that Counterpart reads.
    """
    if not head:
        raise EmptyUpload("The file is empty.", expected=ACCEPTED, advice="Send the file again.")
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    if head.startswith(_ZIP_MAGICS):
        return "zip"
    if _is_nifti(head):
        return "nifti"
    if _is_mgh(head):
        return "mgh"
    if head[_DICOM_MAGIC_AT:].startswith(_DICOM_MAGIC) or _is_bare_dicom(head):
        return "dicom"
    raise NotAnImageFormat(
        "The first bytes are those of no image format that Counterpart reads.",
        expected=ACCEPTED,
        advice="The file's name does not matter, its content does: check what was exported.",
    )


def _is_nifti(head: bytes) -> bool:
    sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")}
    if _NIFTI1_BYTES in sizes:
        magic = head[_NIFTI1_MAGIC_AT:_NIFTI1_BYTES]
        _refuse_pair(magic)
        # A file that ends inside its header is a damaged NIfTI, not another format.
        return magic == _NIFTI1_MAGIC or len(head) < _NIFTI1_BYTES
    if _NIFTI2_BYTES in sizes:
        _refuse_pair(head[4:8])
        return _NIFTI2_MAGIC.startswith(head[4:12])
    return False


def _is_mgh(head: bytes) -> bool:
    if len(head) < _MGH_BYTES:
        return False
    version, *lengths, kind = struct.unpack(">6i", head[:_MGH_BYTES])
    return version == _MGH_VERSION and min(lengths) > 0 and kind in _MGH_TYPES


def _refuse_pair(magic: bytes) -> None:
    if magic in _PAIR_MAGICS:
        raise NotAnImageFormat(
            "This is the header of a NIfTI pair (.hdr and .img), without its voxels.",
            expected=ACCEPTED,
            advice="Save the pair as one .nii file and send that.",
        )


def _is_bare_dicom(head: bytes) -> bool:
    if len(head) < 8:
        return False
    group, element = struct.unpack("<HH", head[:4])
    return group in _DICOM_FIRST_GROUPS and element < _DICOM_FIRST_ELEMENTS
