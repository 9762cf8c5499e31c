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
# Gaps in bone up to twice this width are closed.
CLOSING_MM = 6.0
# Passages narrower than twice this width do not connect two spaces: nerves, vessels and the spinal canal.
OPENING_MM = 5.0
# The outline is rounded off by the opening. This much is given back beyond it, where there is no bone.
MARGIN_MM = 1.5
# The space can grow by this much from one slice to the next where bone does not enclose it.
GROWTH_MM = 4.0
# Neighbours within a slice.
IN_PLANE = ndimage.generate_binary_structure(2, 1)[None]
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
    space = _dilate(core, OPENING_MM + MARGIN_MM, pixel_mm) & ~bone
    largest = int(space.sum(axis=(1, 2)).argmax())
    for step, end in ((-1, -1), (1, len(space))):
        for i in range(largest + step, end, step):
            if space[i].sum() < MIN_SHARE * space[i - step].sum():
                space[i] |= _continue_space(space[i - step], soft[i], pixel_mm)
    # Calcified plexus and falx, and the densest clots, are islands above the limit of bone.
    filled = ndimage.binary_fill_holes(space, IN_PLANE)
    return np.ascontiguousarray(filled[:, margin:-margin, margin:-margin])


def _enclosed_core(bone: BoolArray, soft: BoolArray, pixel_mm: float) -> BoolArray:
    """Return the eroded soft tissue that bone encloses within each slice: the largest connected component."""
    closed = _erode(_dilate(bone, CLOSING_MM, pixel_mm), CLOSING_MM, pixel_mm)
    enclosed = ndimage.binary_fill_holes(closed, IN_PLANE)
    return _largest_component(_erode(enclosed & soft, OPENING_MM, pixel_mm))


def _continue_space(before: BoolArray, soft: BoolArray, pixel_mm: float) -> BoolArray:
    """Return the space of a slice (H, W) from that of its neighbour, where bone does not enclose it."""
    reach = _dilate(before[None], GROWTH_MM, pixel_mm)[0] & soft
    core = _largest_component(_erode(reach[None], OPENING_MM, pixel_mm))
    grown: BoolArray = _dilate(core, OPENING_MM + MARGIN_MM, pixel_mm)[0] & reach
    return grown


def _largest_component(mask: BoolArray) -> BoolArray:
    """Return the largest connected component of a mask. It is empty if the mask is empty."""
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    component: BoolArray = mask & (labels == sizes.argmax())
    return component


def _dilate(stack: BoolArray, mm: float, pixel_mm: float) -> BoolArray:
    """Dilate each slice of (N, H, W) by a disc."""
    near = [ndimage.distance_transform_edt(~image, pixel_mm) <= mm if image.any() else image for image in stack]
    return np.array(near)


def _erode(stack: BoolArray, mm: float, pixel_mm: float) -> BoolArray:
    """Erode each slice of (N, H, W) by a disc."""
    return ~_dilate(~stack, mm, pixel_mm)
