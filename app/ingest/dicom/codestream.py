"""Read the image size that a compressed frame announces, before a decoder allocates memory for it."""

import struct

# JPEG markers: start of image, start of a frame of any process (ITU T.81 table B.1), start of a JPEG-LS frame
# (T.87 C.1.1), JPEG-LS parameters, start of scan.
_JPEG_START = b"\xff\xd8"
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC} | {0xF7}
_JPEG_LS_PARAMETERS, _JPEG_SCAN = 0xF8, 0xDA
# Parameters of this type replace the size of a JPEG-LS frame.
_JPEG_LS_OVERSIZE = 4
# JPEG 2000: start of the codestream and its size segment (ITU T.800 A.5.1); signature and codestream box of a JP2 file.
_J2K_START = b"\xff\x4f\xff\x51"
_JP2_SIGNATURE, _JP2_CODESTREAM = b"\x00\x00\x00\x0cjP  ", b"jp2c"
# Size of images whose real size is hidden.
_UNKNOWN_SIZE = (2**32, 2**32)


def announced_size(frame: bytes) -> tuple[int, int] | None:
    """Return rows and columns of a JPEG, JPEG-LS, JPEG 2000 or HTJ2K frame, or None for any other frame."""
    if frame.startswith(_JPEG_START):
        return _jpeg_size(frame)
    start = _codestream_start(frame)
    if start is None or len(frame) < start + 16:
        return None
    columns, rows = struct.unpack_from(">2I", frame, start + 8)
    return rows, columns


def _jpeg_size(frame: bytes) -> tuple[int, int] | None:
    at = len(_JPEG_START)
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        (length,) = struct.unpack_from(">H", frame, at + 2)
        if marker in _JPEG_FRAMES:
            rows, columns = struct.unpack_from(">2H", frame, at + 5)
            return rows, columns
        if marker == _JPEG_LS_PARAMETERS and frame[at + 4] == _JPEG_LS_OVERSIZE:
            return _UNKNOWN_SIZE
        if marker == _JPEG_SCAN:
            return None
        at += 2 + length
    return None


def _codestream_start(frame: bytes) -> int | None:
    """Return the offset of a JPEG 2000 codestream, which may be inside a JP2 file."""
    if frame.startswith(_J2K_START):
        return 0
    at = 0
    while frame.startswith(_JP2_SIGNATURE) and at + 8 <= len(frame):
        length, kind = struct.unpack_from(">I4s", frame, at)
        header = 8
        if length == 1 and at + 16 <= len(frame):  # the length follows as 64 bits
            (length,) = struct.unpack_from(">Q", frame, at + 8)
            header = 16
        if kind == _JP2_CODESTREAM:
            return at + header if frame.startswith(_J2K_START, at + header) else None
        if length < header:
            return None
        at += length
    return None
