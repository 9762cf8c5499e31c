"""Writer of a mosaic of a volume as a Siemens scanner writes it, with its private header in the layout CSA2."""

import math
import struct

import numpy as np
from pydicom.dataset import FileDataset

from app.volume import Volume
from tests.support.dicom import DEFAULT_SERIES, Series, make_datasets

IMAGE_HEADER = 0x10


def make_mosaic(volume: Volume, series: Series = DEFAULT_SERIES, *, is_reversed: bool = False) -> FileDataset:
    """Return one image with the slices of a volume side by side.

    Parameters
    ----------
    volume : Volume
        Volume of any orientation.
    series : Series
        Its plane determines the slices.
    is_reversed : bool
        The first tile is the last slice along the normal of rows and columns.
    """
    slices = make_datasets(volume, series)
    if is_reversed:
        slices.reverse()
    tiles = np.stack([dataset.pixel_array for dataset in slices])  # (N, rows, columns)
    count, rows, columns = tiles.shape
    side = math.ceil(math.sqrt(count))
    image = np.zeros((side * rows, side * columns), tiles.dtype)
    for k, tile in enumerate(tiles):
        down, across = divmod(k, side)
        image[down * rows : (down + 1) * rows, across * columns : (across + 1) * columns] = tile
    head = slices[0]
    orientation = np.array(head.ImageOrientationPatient, dtype=float)
    step = np.subtract(slices[1].ImagePositionPatient, slices[0].ImagePositionPatient).astype(float)
    # Siemens writes the position of an image as large as the mosaic, centred on the slice.
    between_rows, between_columns = head.PixelSpacing
    shift = (side - 1) / 2 * np.array([columns * between_columns, rows * between_rows])
    corner = np.array(head.ImagePositionPatient, dtype=float)
    corner -= shift[0] * orientation[:3] + shift[1] * orientation[3:]
    head.ImagePositionPatient = [f"{v:.10g}" for v in corner]
    head.SpacingBetweenSlices = f"{np.linalg.norm(step):.10g}"
    head.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    head.Rows, head.Columns = image.shape
    head.PixelData = image.tobytes()
    head.Manufacturer = "SIEMENS"
    normal = step / np.linalg.norm(step)
    block = head.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
    tags = {"NumberOfImagesInMosaic": ("US", [str(count)]), "SliceNormalVector": ("FD", [f"{v:.12g}" for v in normal])}
    block.add_new(IMAGE_HEADER, "OB", csa(tags))
    return head


def csa(tags: dict[str, tuple[str, list[str]]]) -> bytes:
    """Encode a CSA2 header from tag names, value representations, and values as text."""
    out = b"SV10\4\3\2\1" + struct.pack("<2I", len(tags), 77)
    for name, (vr, values) in tags.items():
        out += struct.pack("<64si4s3i", name.encode(), len(values), vr.encode(), 0, len(values), 77)
        for value in values:
            raw = value.encode() + b"\0"
            out += struct.pack("<4i", 0, len(raw), 77, 0) + raw + bytes(-len(raw) % 4)
    return out
