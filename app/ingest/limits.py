"""What one upload may cost before it is refused."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on one scan, checked before anything of that size is allocated.

    Attributes
    ----------
    max_inflated_bytes : int
        Bytes that an upload may become on disk, over all its files. 2 GiB: a CT of
        512 x 512 x 600 is 315 MB, a float64 NIfTI of 512 x 512 x 1024 just fits, and a bomb
        stops here however small it came.
    max_files : int
        Files of one upload. 20,000: a whole study with several series is a few thousand.
    max_voxels : int
        Voxels of one volume. 512 x 512 x 1024, which is 1 GiB as float32; head scans at half a
        millimetre have 500 slices.
    """

    max_inflated_bytes: int = 2 * 1024**3
    max_files: int = 20_000
    max_voxels: int = 512 * 512 * 1024


STANDARD = Limits()
