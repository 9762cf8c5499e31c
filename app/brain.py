"""The brain of a head: what lies outside it is set to the background, and its mask is kept.

The method is deepbet's, with its networks: L. Fisch et al., deepbet: Fast brain extraction of T1-weighted MRI
using Convolutional Neural Networks, Computers in Biology and Medicine 179 (2024) 108845. The scan's own grid,
turned to RAS+ and stretched to a cube, goes through a first network; the box around the brain that it finds,
stretched to a finer cube, through a second one, which outlines it. Added here is when not to extract, and how
a failure is recognised.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.errors import BrainNotExtracted, NoBrainMask
from app.pipeline.prepare import BoolArray
from app.volume import FloatArray, Volume

# (1, 1, I, J, K) intensities -> (1, 1, I, J, K) log odds of brain.
Network = Callable[[FloatArray], FloatArray]

T = TypeVar("T", bound=np.generic)

# ---- as published ------------------------------------------------------------------------------
COARSE_SIDE = 128
FINE_SIDE = 256
QUANTILES = (0.005, 0.995)
MEAN, DEVIATION = 0.449, 0.226
# The box: planes with this share of brain, and this share of its size around it on each side.
LEAST_IN_PLANE = 0.02
MARGIN = 0.1

# ---- when not to extract -----------------------------------------------------------------------
# The networks know whole heads: less than this cannot show one.
LEAST_FIELD_MM = 100.0
LEAST_PLANES = 16
# Share of what stands out from the background that lies outside the brain. Skull, scalp and face are more than
# half of a head (0.57 to 0.73), a brain that stands alone differs by a rim (0.09 to 0.22).
ALONE = 0.3
# Share of the range of intensities at which the background ends: below fluid on T1.
BRIGHT = 0.1

# ---- when to refuse ----------------------------------------------------------------------------
# Adult brains with their fluid measure 1,000 to 2,000 ml; half of one is still worth a look.
VOLUME_ML = (500.0, 2300.0)
# Dice of both networks, which see the head at different sizes: T1 of adults has 0.98, what the networks do not
# know mostly less than 0.92 (decision 11).
LEAST_AGREEMENT = 0.95
# The brain is one piece: share of the outlined voxels that hang together.
LEAST_IN_ONE_PIECE = 0.95
# Cross-section of the brain at the border of the field of view. Below the vertex it grows to 200 cm2.
MOST_CUT_CM2 = 100.0
TOLD_CUT_CM2 = 1.0


@dataclass(frozen=True)
class Networks:
    """Both networks; onnxruntime in production, anything callable in tests."""

    coarse: Network
    fine: Network


@dataclass(frozen=True, eq=False)
class Brain:
    """A brain that was taken out of its head.

    Attributes
    ----------
    volume : Volume
        The scan with everything outside the brain set to the background.
    mask : (X, Y, Z) ndarray of bool
        The brain, on the scan's own grid.
    volume_ml : float
    agreement : float
        Dice of the two networks' outlines, 0 to 1.
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
        """What a reader of the results must know, in sentences."""
        if self.cut_cm2 < TOLD_CUT_CM2:
            return ()
        return (
            f"The brain reaches the border of the field of view over {self.cut_cm2:.0f} cm2: what is beyond is lost.",
        )


def extract(volume: Volume, networks: Networks) -> Brain | NoBrainMask:
    """Take the brain out of a head, or say why the scan is left as it is.

    Parameters
    ----------
    volume : Volume
        T1-weighted, any orientation and spacing.
    networks : Networks
        deepbet's two.

    Returns
    -------
    Brain or NoBrainMask
        The latter where the brain stands alone already, or where too little is shown to find a brain in.

    Raises
    ------
    BrainNotExtracted
        What was outlined cannot be a brain.
    """
    field = np.array(volume.shape) * volume.spacing
    if field.min() < LEAST_FIELD_MM or min(volume.shape) < LEAST_PLANES:
        return _too_small(volume, field)
    turned = nib.orientations.io_orientation(volume.affine)
    head, cube, located, low, high = locate(volume, networks)
    if outside_share(cube, located, low, high) <= ALONE:
        return _alone()

    box = _box_around(located, head.shape)
    fine = _run(networks.fine, _stretch(head[box], (FINE_SIDE,) * 3), low, high) > 0
    outlined, in_one_piece = _one_piece(_stretch(fine, head[box].shape))
    found = np.zeros(head.shape, dtype=bool)
    found[box] = ndimage.binary_fill_holes(outlined)
    agreement = _dice(found, _stretch(located, head.shape))
    straight = nib.orientations.axcodes2ornt("RAS")
    mask = nib.orientations.apply_orientation(found, nib.orientations.ornt_transform(straight, turned))
    brain = _alone_in_background(volume, np.ascontiguousarray(mask), low, agreement)
    _check(brain, in_one_piece)
    return brain


def locate(volume: Volume, networks: Networks) -> tuple[FloatArray, FloatArray, BoolArray, float, float]:
    """Find the brain with the first network.

    Returns
    -------
    head : (I, J, K) ndarray
        The scan, its axes along RAS+ as nearly as they go.
    cube : (128, 128, 128) ndarray
        The same, stretched.
    located : (128, 128, 128) ndarray of bool
        The brain in it.
    low, high : float
        The range of intensities that the networks are shown.
    """
    head: FloatArray = nib.orientations.apply_orientation(volume.array, nib.orientations.io_orientation(volume.affine))
    cube = _stretch(head, (COARSE_SIDE,) * 3)
    low, high = (float(np.quantile(cube, q)) for q in QUANTILES)
    if high <= low:
        raise _failed("nothing stands out from the background")
    located, _ = _one_piece(_run(networks.coarse, cube, low, high) > 0)
    return head, cube, located, low, high


def outside_share(cube: FloatArray, located: BoolArray, low: float, high: float) -> float:
    """How much of what is brighter than the background lies outside the brain, 0 to 1; 1 where there is no brain."""
    bright = cube > low + BRIGHT * (high - low)
    return float((bright & ~located).sum() / bright.sum()) if located.any() else 1.0


def _run(network: Network, cube: FloatArray, low: float, high: float) -> FloatArray:
    """One network on intensities as it was trained on, (I, J, K) -> (I, J, K)."""
    x = np.clip((cube - low) / (high - low), 0, 1)
    x = DEVIATION * (x - x.mean()) / x.std() + MEAN
    result: FloatArray = network(x.astype(np.float32)[None, None])[0, 0]
    return result


def _stretch(array: npt.NDArray[T], shape: tuple[int, ...]) -> npt.NDArray[T]:
    """The nearest voxel of each of another number of planes, as torch's `nearest-exact` takes it."""
    planes = [((np.arange(n) + 0.5) * s / n).astype(int) for n, s in zip(shape, array.shape, strict=True)]
    return array[np.ix_(*planes)]


def _box_around(located: BoolArray, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where in the head the brain is, with a margin."""
    box = []
    for axis, (side, size) in enumerate(zip(located.shape, shape, strict=True)):
        others = tuple(i for i in range(3) if i != axis)
        planes = np.flatnonzero(located.mean(axis=others) > LEAST_IN_PLANE)
        if planes.size == 0:
            raise _failed("no brain was found in it")
        first, last = planes[0] * size / side, (planes[-1] + 1) * size / side
        centre, half = round((first + last) / 2), round((last - first) * (1 + 2 * MARGIN)) / 2
        box.append(slice(max(0, int(centre - half)), min(size, int(centre + half))))
    return tuple(box)


def _one_piece(mask: BoolArray) -> tuple[BoolArray, float]:
    """The largest connected part, voxels joining over corners, and its share of all."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count == 0:
        return mask, 0.0
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax(), float(sizes.max() / sizes.sum())


def _alone_in_background(volume: Volume, mask: BoolArray, background: float, agreement: float) -> Brain:
    """A mask with its numbers, and the scan without what lies outside."""
    if not mask.any():
        raise _failed("no brain was found in it")
    sizes = volume.spacing
    cut = 0.0
    for axis in range(3):
        pixel_cm2 = float(np.prod(np.delete(sizes, axis))) / 100
        cut += pixel_cm2 * sum(int(np.take(mask, i, axis=axis).sum()) for i in (0, -1))
    inside = np.maximum(volume.array, np.float32(background))
    return Brain(
        volume=Volume(np.where(mask, inside, np.float32(background)), volume.affine),
        mask=mask,
        volume_ml=float(mask.sum() * volume.voxel_ml),
        agreement=agreement,
        cut_cm2=cut,
    )


def _check(brain: Brain, in_one_piece: float) -> None:
    """Refuse what cannot be a brain, with every reason."""
    least, most = VOLUME_ML
    reasons = []
    if not least <= brain.volume_ml <= most:
        reasons.append(f"what was outlined measures {brain.volume_ml:.0f} ml, a brain {least:.0f} to {most:.0f}")
    if brain.agreement < LEAST_AGREEMENT:
        reasons.append(
            f"the two networks agree with a Dice of {brain.agreement:.2f}, at least {LEAST_AGREEMENT} is expected"
        )
    if in_one_piece < LEAST_IN_ONE_PIECE:
        reasons.append(f"only {in_one_piece:.0%} of what was outlined hangs together")
    if brain.cut_cm2 > MOST_CUT_CM2:
        reasons.append(
            f"it is cut off by the border of the field of view over {brain.cut_cm2:.0f} cm2, "
            f"at most {MOST_CUT_CM2:.0f} are accepted"
        )
    if reasons:
        raise _failed("; ".join(reasons))


def _dice(a: BoolArray, b: BoolArray) -> float:
    size = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / size if size else 0.0


def _failed(why: str) -> BrainNotExtracted:
    return BrainNotExtracted(
        f"The brain could not be taken out of the scan: {why}.",
        expected="a T1-weighted scan of a whole adult head, or of a brain with everything else set to 0.",
        advice="Check that the right series was sent; a scan that is skull-stripped elsewhere is analysed as it is.",
    )


def _alone() -> NoBrainMask:
    return NoBrainMask(
        "The brain stands alone in the scan already: nothing was extracted.",
        expected="a scan of a head.",
        advice="The analysed extent is where anomaly.nii.gz has a value.",
    )


def _too_small(volume: Volume, field: npt.NDArray[np.float64]) -> NoBrainMask:
    planes = " x ".join(str(n) for n in volume.shape)
    return NoBrainMask(
        f"The scan has {planes} voxels over {field[0]:.0f} x {field[1]:.0f} x {field[2]:.0f} mm: too few to find a "
        "brain in, so it was analysed as it is.",
        expected=f"at least {LEAST_PLANES} voxels and {LEAST_FIELD_MM:.0f} mm along each axis.",
        advice="Send the whole volume.",
    )
