"""Small picture of a result for lists: the axial plane of the surest finding with the outlines of the mask.

It follows the radiological convention, like `app.export.preview`: the patient's right is on the viewer's left.
"""

from pathlib import Path

import numpy as np
from nibabel import affines
from PIL import Image
from scipy import ndimage

from app.export.preview import MASK_COLOUR, RgbImage, View, choose_planes, outlines
from app.pipeline.findings import ScanResult

SIZE = 160
# Around the analysed region.
BORDER_MM = 6.0


def write_thumbnail(path: Path, result: ScanResult) -> None:
    """Draw the axial plane of the surest finding, or the middle one of a scan without findings.

    Parameters
    ----------
    path : Path
        PNG file to write.
    result : ScanResult
    """
    Image.fromarray(draw_thumbnail(result)).save(path, format="PNG", optimize=False)


def draw_thumbnail(result: ScanResult) -> RgbImage:
    """Return the picture, (`SIZE`, `SIZE`, 3)."""
    points = choose_square(result).points(choose_plane(result))
    voxels = np.moveaxis(affines.apply_affine(np.linalg.inv(result.affine), points), -1, 0)
    grid = result.detection.slices.grid
    scan = ndimage.map_coordinates(result.volume.array, voxels, order=1, cval=grid.background, output=np.float32)
    labels = ndimage.map_coordinates(result.labels, voxels, order=0, cval=0)
    grey = np.clip((scan - np.float32(grid.background)) / np.float32(grid.scale), 0, 1)
    picture = np.round(grey * 255).astype(np.uint8)[..., None].repeat(3, axis=-1)
    picture[outlines(labels)] = MASK_COLOUR
    return np.asarray(picture, dtype=np.uint8)


def choose_plane(result: ScanResult) -> float:
    """Return the RAS+ height of the plane to draw, in mm."""
    if result.lesions:
        return max(result.lesions, key=lambda lesion: (lesion.peak, -lesion.label)).key_z_mm
    planes = choose_planes(result)
    return planes[len(planes) // 2]


def choose_square(result: ScanResult) -> View:
    """Return the square around everything that was analysed."""
    slices = result.detection.slices
    rows, columns = np.nonzero(slices.foreground[result.detection.analysed].any(axis=0))
    affine = slices.grid.affine
    y = affine[1, 1] * np.array([rows.min(), rows.max()]) + affine[1, 3]
    x = affine[0, 2] * np.array([columns.min(), columns.max()]) + affine[0, 3]
    side = float(max(np.ptp(x), np.ptp(y))) + 2 * BORDER_MM
    return View(float(x.mean()) + side / 2, float(y.mean()) + side / 2, SIZE, SIZE, side / SIZE)
