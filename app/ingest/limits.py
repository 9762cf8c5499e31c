"""Limits on one upload, and buffer sizes: a module of its own because every reader imports it."""

from dataclasses import dataclass

# Detecting a format needs this many bytes of a file: the header of NIfTI-2 is the longest.
HEAD_BYTES = 540
# Compressed files are read and written in pieces of this size.
CHUNK_BYTES = 1 << 20
# Prefix of the folder, inside the folder of the results, into which an archive is unpacked.
UNPACKED_PREFIX = ".unpacked-"


@dataclass(frozen=True)
class Limits:
    """Limits on one upload, checked before memory or disk space of that size is used.

    Attributes
    ----------
    max_inflated_bytes : int
        Bytes of all files of the upload after decompression. The default is 2 GiB: a CT of 512 x 512 x 600
        voxels has 315 MB, and a float64 NIfTI file of 512 x 512 x 1024 voxels just fits.
    max_files : int
        Files in one upload. The default is 20,000: a whole study of several series has a few thousand.
    max_voxels : int
        Voxels of one volume. The default is 512 x 512 x 1024, 1 GiB as float32: head scans of half a
        millimetre have 500 slices.
    """

    max_inflated_bytes: int = 2 * 1024**3
    max_files: int = 20_000
    max_voxels: int = 512 * 512 * 1024


DEFAULT_LIMITS = Limits()


def is_blank(head: bytes) -> bool:
    """Return True if the first `HEAD_BYTES` bytes of a file are all 0, or there are none: its content was lost."""
    return not head.strip(b"\0")
