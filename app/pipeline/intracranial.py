"""Intracranial space of a head CT: the soft tissue and fluid inside the skull.

Bone is far denser than everything around it, so no network is needed. Slices that bone encloses are filled. Bone has
openings at the skull base (orbits, petrous bones, foramen magnum), and after a fracture or an operation. There, the
space of the neighbouring slice is continued as far as soft tissue reaches.
"""

import numpy as np
from scipy import ndimage

from app.volume import BoolArray, FloatArray

# Hounsfield units. Clotted blood stays below 90, and bone of the skull is above it at any slice thickness in use.
BONE_HU = 90.0
# Fat is near -100 and water is 0. Noise of a thin slice may reach -50 in fluid.
SOFT_TISSUE_HU = (-50.0, BONE_HU)
# Air inside the skull after an injury or an operation belongs to the space, air of the sinuses does not touch it.
# Gaps in bone up to twice this width are closed.
CLOSING_MM = 6.0
# Passages narrower than twice this width do not connect two spaces: nerves, vessels and the spinal canal.
OPENING_MM = 5.0
# The outline is rounded off by the opening. This much is given back beyond it, where there is no bone.
MARGIN_MM = 1.5
# The space can grow by this much from one slice to the next where bone does not enclose it.
GROWTH_MM = 4.0
# If a slice has a smaller share of the area of its neighbour nearer to the middle, its bone has an opening.
MIN_SHARE = 0.6


def intracranial_mask(hu: FloatArray, pixel_mm: float) -> BoolArray:
    """Return the space inside the skull.

    Parameters
    ----------
    hu : (N, H, W) ndarray
        Axial slices in Hounsfield units, in anatomical order.
    pixel_mm : float
        Side of a square pixel.

    Returns
    -------
    (N, H, W) ndarray of bool
        Empty if bone encloses nothing in any slice.
    """
    # Padded, so that the closing does not reach the border of the image.
    margin = int(np.ceil(CLOSING_MM / pixel_mm)) + 1
    padding = ((0, 0), (margin, margin), (margin, margin))
    padded = np.pad(hu, padding, constant_values=-1000.0)
    bone = padded > BONE_HU
    soft = (padded > SOFT_TISSUE_HU[0]) & ~bone
    core = _enclosed_core(bone, soft, pixel_mm)
    if not core.any():
        return np.zeros(hu.shape, dtype=np.bool_)
    space = _by_slice(core, OPENING_MM + MARGIN_MM, pixel_mm) & ~bone
    largest = int(space.sum(axis=(1, 2)).argmax())
    for step, end in ((-1, -1), (1, len(space))):
        for i in range(largest + step, end, step):
            _continue_space(space, i, i - step, soft[i], pixel_mm)
    # Calcified plexus and falx, and the densest clots, are islands above the limit of bone.
    filled = np.array([ndimage.binary_fill_holes(image) for image in space])
    return np.ascontiguousarray(filled[:, margin:-margin, margin:-margin])


def _enclosed_core(bone: BoolArray, soft: BoolArray, pixel_mm: float) -> BoolArray:
    """Return the eroded soft tissue that bone encloses within each slice: the largest connected component."""
    closed = ~_by_slice(~_by_slice(bone, CLOSING_MM, pixel_mm), CLOSING_MM, pixel_mm)
    enclosed = np.array([ndimage.binary_fill_holes(image) for image in closed])
    labels, count = ndimage.label(_erode(enclosed & soft, OPENING_MM, pixel_mm))
    if not count:
        return np.zeros(bone.shape, dtype=np.bool_)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    core: BoolArray = labels == sizes.argmax()
    return core


def _continue_space(space: BoolArray, i: int, neighbour: int, soft: BoolArray, pixel_mm: float) -> None:
    """Extend the space in place from a slice to the next one, where bone does not enclose it."""
    before = space[neighbour]
    if not before.any() or space[i].sum() >= MIN_SHARE * before.sum():
        return
    reach = _dilate(before, GROWTH_MM, pixel_mm)
    core = _erode((soft & reach)[None], OPENING_MM, pixel_mm)[0]
    labels, count = ndimage.label(core)
    if not count:
        return
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    grown = _dilate(labels == sizes.argmax(), OPENING_MM + MARGIN_MM, pixel_mm)
    space[i] |= grown & soft & reach


def _dilate(image: BoolArray, mm: float, pixel_mm: float) -> BoolArray:
    """Dilate one slice (H, W) by a disc."""
    if not image.any():
        return image
    near: BoolArray = ndimage.distance_transform_edt(~image, pixel_mm) <= mm
    return near


def _by_slice(stack: BoolArray, mm: float, pixel_mm: float) -> BoolArray:
    """Dilate each slice of (N, H, W) by a disc."""
    return np.array([_dilate(image, mm, pixel_mm) for image in stack])


def _erode(stack: BoolArray, mm: float, pixel_mm: float) -> BoolArray:
    """Erode each slice of (N, H, W) by a disc."""
    return ~_by_slice(~stack, mm, pixel_mm)
