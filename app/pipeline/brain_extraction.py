"""Brain extraction: set everything outside the brain of a head to the background, and keep the mask.

The method and its networks are those of deepbet: L. Fisch et al., deepbet: Fast brain extraction of T1-weighted MRI
using Convolutional Neural Networks, Computers in Biology and Medicine 179 (2024) 108845. The scan is reoriented to RAS+
and resampled to a cube, in which a first network locates the brain. The box around it is resampled to a finer cube, in
which a second network outlines the brain. The checks before and after the extraction are not part of
deepbet (decision 11).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.errors import BrainNotExtracted, NoBrainMask
from app.pipeline.findings import dice
from app.volume import BoolArray, FloatArray, Volume

# (1, 1, I, J, K) intensities -> (1, 1, I, J, K) log odds of brain.
ExtractionNetwork = Callable[[FloatArray], FloatArray]

T = TypeVar("T", bound=np.generic)

# ---- constants of deepbet, as published --------------------------------------------------------
COARSE_SIDE = 128
FINE_SIDE = 256
QUANTILES = (0.005, 0.995)
MEAN, DEVIATION = 0.449, 0.226
# The box contains the planes with at least this fraction of brain, and a margin on each side relative to its size.
MIN_BRAIN_IN_PLANE = 0.02
MARGIN = 0.1

# ---- extraction is skipped ---------------------------------------------------------------------
# The networks were trained on whole heads, which a smaller field of view cannot contain.
MIN_FIELD_MM = 100.0
MIN_VOXELS = 16
# Fraction of the bright voxels outside the brain. Skull, scalp and face make up 0.57 to 0.73 of a head. In a
# skull-stripped scan only a rim of 0.09 to 0.22 is left.
MAX_BRIGHT_FRACTION_OUTSIDE = 0.3
# A voxel is bright above this fraction of the intensity range, which is below fluid on T1.
BRIGHT_LEVEL = 0.1

# ---- extraction has failed ---------------------------------------------------------------------
# Brains of adults with their fluid measure 1,000 to 2,000 ml. Half of a brain is still accepted.
VOLUME_ML = (500.0, 2300.0)
# Dice of the two networks, which take the head at different sizes. Decision 11 lists it for T1 and for other images. A
# FLAIR template also exceeds this limit.
MIN_AGREEMENT = 0.95
# Fraction of the outlined voxels in the largest connected component.
MIN_CONNECTED = 0.95
# Cross-section of the brain at the border of the field of view. If it is larger, a large part of the brain is missing.
MAX_CUT_CM2 = 100.0
MIN_WARNED_CUT_CM2 = 1.0


@dataclass(frozen=True)
class ExtractionNetworks:
    """Coarse and fine network: onnxruntime sessions in production, any callables in tests."""

    coarse: ExtractionNetwork
    fine: ExtractionNetwork


@dataclass(frozen=True, eq=False)
class BrainExtraction:
    """Brain extracted from a head.

    Attributes
    ----------
    volume : Volume
        Scan with everything outside the brain set to the background.
    mask : (X, Y, Z) ndarray of bool
        Brain, on the grid of the scan.
    volume_ml : float
    agreement : float
        Dice of the outlines of the two networks, 0 to 1.
    cut_cm2 : float
        Cross-section of the brain at the border of the field of view.
    """

    volume: Volume
    mask: BoolArray
    volume_ml: float
    agreement: float
    cut_cm2: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences that the report and the terminal show with the results."""
        if self.cut_cm2 < MIN_WARNED_CUT_CM2:
            return ()
        return (
            f"The field of view cuts off the brain over {self.cut_cm2:.0f} cm2. The part beyond it was not analysed.",
        )


def extract_brain(volume: Volume, networks: ExtractionNetworks) -> BrainExtraction | NoBrainMask:
    """Extract the brain from a head, or return the reason why extraction was skipped.

    Parameters
    ----------
    volume : Volume
        T1-weighted scan, any orientation and spacing.
    networks : ExtractionNetworks

    Returns
    -------
    BrainExtraction or NoBrainMask
        `NoBrainMask` if the scan is already skull-stripped, or too small to contain a head.

    Raises
    ------
    BrainNotExtracted
        The outlined region cannot be a brain.
    """
    field = np.array(volume.shape) * volume.spacing
    if field.min() < MIN_FIELD_MM or min(volume.shape) < MIN_VOXELS:
        return _too_small(volume, field)
    orientation = nib.orientations.io_orientation(volume.affine)
    head, cube, located, low, high = locate_brain(volume, networks)
    if compute_outside_fraction(cube, located, low, high) <= MAX_BRIGHT_FRACTION_OUTSIDE:
        return _skull_stripped()

    box = _box_around(located, head.shape)
    fine = _run_network(networks.fine, _resample(head[box], (FINE_SIDE,) * 3), low, high) > 0
    outlined, connected = _largest_component(_resample(fine, head[box].shape))
    found = np.zeros(head.shape, dtype=bool)
    found[box] = ndimage.binary_fill_holes(outlined)
    agreement = dice(found, _resample(located, head.shape))
    ras = nib.orientations.axcodes2ornt("RAS")
    mask = nib.orientations.apply_orientation(found, nib.orientations.ornt_transform(ras, orientation))
    brain = _apply_mask(volume, np.ascontiguousarray(mask), low, agreement)
    _check_plausible(brain, connected)
    return brain


def locate_brain(
    volume: Volume, networks: ExtractionNetworks
) -> tuple[FloatArray, FloatArray, BoolArray, float, float]:
    """Locate the brain with the coarse network.

    Returns
    -------
    head : (I, J, K) ndarray
        Scan with its axes reordered and flipped to the closest RAS+ axes.
    cube : (128, 128, 128) ndarray
        Head, resampled.
    located : (128, 128, 128) ndarray of bool
        Brain in the cube.
    low, high : float
        Intensity range that is mapped to [0, 1] for the networks.
    """
    head: FloatArray = nib.orientations.apply_orientation(volume.array, nib.orientations.io_orientation(volume.affine))
    cube = _resample(head, (COARSE_SIDE,) * 3)
    low, high = (float(np.quantile(cube, q)) for q in QUANTILES)
    if high <= low:
        raise _not_extracted("nothing is brighter than the background")
    located, _ = _largest_component(_run_network(networks.coarse, cube, low, high) > 0)
    return head, cube, located, low, high


def compute_outside_fraction(cube: FloatArray, located: BoolArray, low: float, high: float) -> float:
    """Return the fraction of the bright voxels that lies outside the brain. It is 1 if there is no brain."""
    bright = cube > low + BRIGHT_LEVEL * (high - low)
    return float((bright & ~located).sum() / bright.sum()) if located.any() else 1.0


def _run_network(network: ExtractionNetwork, cube: FloatArray, low: float, high: float) -> FloatArray:
    """Normalise intensities as in the training of deepbet and run one network, (I, J, K) -> (I, J, K)."""
    x = np.clip((cube - low) / (high - low), 0, 1)
    x = DEVIATION * (x - x.mean()) / x.std() + MEAN
    result: FloatArray = network(x.astype(np.float32)[None, None])[0, 0]
    return result


def _resample(array: npt.NDArray[T], shape: tuple[int, ...]) -> npt.NDArray[T]:
    """Resample to another shape with nearest neighbours, as `nearest-exact` of torch does."""
    planes = [((np.arange(n) + 0.5) * s / n).astype(int) for n, s in zip(shape, array.shape, strict=True)]
    return array[np.ix_(*planes)]


def _box_around(located: BoolArray, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the box around the brain in the head, with a margin."""
    box = []
    for axis, (side, size) in enumerate(zip(located.shape, shape, strict=True)):
        others = tuple(i for i in range(3) if i != axis)
        planes = np.flatnonzero(located.mean(axis=others) > MIN_BRAIN_IN_PLANE)
        if planes.size == 0:
            raise _not_extracted("no brain was found")
        first, last = planes[0] * size / side, (planes[-1] + 1) * size / side
        centre, half = round((first + last) / 2), round((last - first) * (1 + 2 * MARGIN)) / 2
        box.append(slice(max(0, int(centre - half)), min(size, int(centre + half))))
    return tuple(box)


def _largest_component(mask: BoolArray) -> tuple[BoolArray, float]:
    """Return the largest 26-connected component of a mask and its fraction of the mask."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count == 0:
        return mask, 0.0
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax(), float(sizes.max() / sizes.sum())


def _apply_mask(volume: Volume, mask: BoolArray, background: float, agreement: float) -> BrainExtraction:
    """Set everything outside a mask to the background, and measure the mask."""
    if not mask.any():
        raise _not_extracted("no brain was found")
    sizes = volume.spacing
    cut = 0.0
    for axis in range(3):
        pixel_cm2 = float(np.prod(np.delete(sizes, axis))) / 100
        cut += pixel_cm2 * sum(int(np.take(mask, i, axis=axis).sum()) for i in (0, -1))
    inside = np.maximum(volume.array, np.float32(background))
    return BrainExtraction(
        volume=Volume(np.where(mask, inside, np.float32(background)), volume.affine),
        mask=mask,
        volume_ml=float(mask.sum() * volume.voxel_ml),
        agreement=agreement,
        cut_cm2=cut,
    )


def _check_plausible(brain: BrainExtraction, connected: float) -> None:
    """Raise `BrainNotExtracted`, with every reason, if the outlined region cannot be a brain."""
    smallest, largest = VOLUME_ML
    reasons = []
    if not smallest <= brain.volume_ml <= largest:
        reasons.append(
            f"the outlined region measures {brain.volume_ml:.0f} ml, a brain measures {smallest:.0f} to {largest:.0f}"
        )
    if brain.agreement < MIN_AGREEMENT:
        reasons.append(
            f"the two networks agree with a Dice of {brain.agreement:.2f}, at least {MIN_AGREEMENT} is expected"
        )
    if connected < MIN_CONNECTED:
        reasons.append(f"only {connected:.0%} of the outlined region is connected")
    if brain.cut_cm2 > MAX_CUT_CM2:
        reasons.append(
            f"the border of the field of view cuts the brain: {brain.cut_cm2:.0f} cm2 of its cross-section, "
            f"at most {MAX_CUT_CM2:.0f} are accepted"
        )
    if reasons:
        raise _not_extracted("; ".join(reasons))


def _not_extracted(why: str) -> BrainNotExtracted:
    return BrainNotExtracted(
        f"The brain could not be extracted from the scan: {why}.",
        expected="a T1-weighted scan of a whole adult head, or a skull-stripped scan whose background is 0.",
        advice="Check that the right series was sent, or send a scan that was skull-stripped by other software.",
    )


def _skull_stripped() -> NoBrainMask:
    return NoBrainMask(
        "The scan is already skull-stripped. Brain extraction was skipped.",
        expected="a scan of a head.",
        advice="Use the mask of the software that stripped the skull.",
    )


def _too_small(volume: Volume, field: npt.NDArray[np.float64]) -> NoBrainMask:
    shape = " x ".join(str(n) for n in volume.shape)
    return NoBrainMask(
        f"The scan has {shape} voxels over {field[0]:.0f} x {field[1]:.0f} x {field[2]:.0f} mm. This is too small for "
        "brain extraction, so the scan was analysed without it.",
        expected=f"at least {MIN_VOXELS} voxels and {MIN_FIELD_MM:.0f} mm along each axis.",
        advice="Send the whole volume.",
    )
