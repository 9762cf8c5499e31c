"""Siemens mosaics: all slices of one volume as tiles of one image.

The tiles are arranged in rows from the top left. ImagePositionPatient of a mosaic is that of an image as large as
the mosaic, centred on the slice. Only the private header of Siemens (CSA) states the direction of the slices, so a
mosaic without it is not read. nibabel parses that header.
"""

import math

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.tag import BaseTag, Tag

from app.dicom_attributes import optional_numbers
from app.errors import TooManyVoxels
from app.ingest.dicom.geometry import Plane
from app.ingest.limits import Limits

# Scanners write up to some hundred tiles.
MAX_TILES = 1024
# The private creators of group 0029, and the image header in each of their blocks.
_BLOCKS = (0x10, 0x11, 0x12)
MOSAIC_TAGS: list[BaseTag] = [
    Tag(keyword) for keyword in ("Manufacturer", "SpacingBetweenSlices", "ImagePositionPatient", "Rows", "Columns")
] + [Tag(0x0029, element) for block in _BLOCKS for element in (block, (block << 8) + 0x10)]


def locate_tiles(dataset: pydicom.Dataset, limits: Limits) -> tuple[tuple[Plane, ...], int] | None:
    """Return the positions of the tiles of a mosaic.

    Parameters
    ----------
    dataset : pydicom.Dataset
        Header with `MOSAIC_TAGS`.
    limits : Limits
        Limits on the announced size, which is checked before the tiles are listed.

    Returns
    -------
    planes : tuple of Plane
        Position of each tile.
    side : int
        Number of tiles along one side of the mosaic.

    None is returned if the private header, the slice spacing or the position is missing.

    Raises
    ------
    TooManyVoxels
        If the header announces more pixels or tiles than the limit.
    """
    # nibabel.nicom emits a warning when it is imported: this runs inside `silence_libraries`.
    from nibabel.nicom.csareader import get_csa_header, get_n_mosaic, get_slice_normal  # noqa: PLC0415
    from nibabel.nicom.dicomwrappers import MosaicWrapper  # noqa: PLC0415

    csa = get_csa_header(dataset)
    if csa is None or not get_n_mosaic(csa) or get_slice_normal(csa) is None:
        return None
    keywords = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices")
    if not all(dataset.get(keyword) for keyword in keywords):
        return None
    count = int(get_n_mosaic(csa))
    pixels = int(dataset.Rows) * int(dataset.Columns)
    if count > MAX_TILES or pixels > limits.max_voxels:
        raise TooManyVoxels(
            f"A Siemens mosaic announces {count} tiles and {pixels} pixels.",
            expected=f"at most {MAX_TILES} tiles and {limits.max_voxels} pixels.",
            advice="Export the series again from the original.",
        )
    side = math.isqrt(count - 1) + 1 if count > 0 else 0
    if not side or dataset.Rows % side or dataset.Columns % side:
        return None
    wrapper = MosaicWrapper(dataset, csa, count)
    first, step = wrapper.image_position, wrapper.slice_normal * wrapper.voxel_sizes[2]
    orientation = tuple(float(v) for v in dataset.ImageOrientationPatient)
    spacing = tuple(float(v) for v in dataset.PixelSpacing)
    thickness = next(iter(optional_numbers(dataset, "SliceThickness")), 0.0) or None
    return tuple(Plane(tuple(first + k * step), orientation, spacing, thickness) for k in range(count)), side


def split_tiles(mosaic: npt.NDArray[np.generic], side: int) -> npt.NDArray[np.generic]:
    """Split a mosaic into its tiles, (rows, columns) -> (side * side, rows / side, columns / side)."""
    rows, columns = mosaic.shape[0] // side, mosaic.shape[1] // side
    tiles = mosaic.reshape(side, rows, side, columns).swapaxes(1, 2)  # (down, across, rows, columns)
    return tiles.reshape(side * side, rows, columns)
