"""Frames with a place in space -> one regular stack, or the reason why they are none."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from highdicom.spatial import convert_affine_to_convention, create_affine_matrix_from_attributes
from nibabel import aff2axcodes

from app.errors import InvalidGeometry, IrregularSlices, NotAVolume
from app.ingest.plane import Plane
from app.volume import Affine

IntArray = npt.NDArray[np.int64]
Distances = npt.NDArray[np.float64]

# Scanners write positions to a tenth or a hundredth of a millimetre: a slice that is farther than
# half a tenth from its regular place is misplaced, or its neighbour is missing.
UNEVEN_MM = 0.05
# Direction cosines with four decimals let the far end of a stack drift sideways by some hundredths.
LEAN_MM = 0.2
# Row and column directions of an image are unit vectors at a right angle, within rounding.
COSINE_TOLERANCE = 1e-3
# Slices thinner than this share of their distance leave unseen tissue between them.
GAP_SHARE = 0.67

_ENDS = {
    "S": "from the feet up",
    "I": "from the head down",
    "L": "from right to left",
    "R": "from left to right",
    "A": "from back to front",
    "P": "from front to back",
}
_ADVICE = (
    "Send the whole series as it was acquired, a tilted one reconstructed without tilt; or choose to have it "
    "resampled: `--geometry resample`, `?geometry=resample`."
)


@dataclass(frozen=True, eq=False)
class Arrangement:
    """A stack in its order.

    Attributes
    ----------
    order : (N,) ndarray of int
        Indices of the frames along the stack's normal.
    affine : (4, 4) ndarray
        Indices (column, row, slice) to RAS+ mm, if the stack is regular.
    notes : tuple of str
        What a reader of the results should know of the spacing.
    faults : tuple of str
        Why the stack is not regular, with place and size; empty if it is.
    """

    order: IntArray
    affine: Affine
    notes: tuple[str, ...]
    faults: tuple[str, ...]

    def check_regular(self, hint: str = "") -> None:
        """Refuse a stack with faults.

        Parameters
        ----------
        hint : str
            One sentence more.

        Raises
        ------
        IrregularSlices
        """
        if self.faults:
            raise IrregularSlices(
                " ".join([*self.faults, *filter(None, [hint])]),
                expected="slices at equal distances along one straight line, at a right angle to it.",
                advice=_ADVICE,
            )


def arrange(planes: Sequence[Plane]) -> Arrangement:
    """Order the frames of a stack and place it.

    Parameters
    ----------
    planes : sequence of Plane
        Frames of one orientation, in any order.

    Raises
    ------
    NotAVolume, IrregularSlices
        Several frames at each position, or at some.
    InvalidGeometry
        Directions, positions or spacings that cannot be.
    """
    first = planes[0]
    _check_plane(first)
    positions = np.array([plane.position for plane in planes])  # (N, 3)
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    distances = positions @ normal
    order = np.argsort(distances, kind="stable")
    positions, distances = positions[order], distances[order]
    if not np.isfinite(positions).all():
        raise _impossible("An image position is not a finite number.")

    spacing, notes = _spacing(distances, first)
    affine = affine_of(planes[int(order[0])], spacing)
    faults: list[str] = []
    if len(planes) > 1:
        _check_repeats(distances)
        faults = [*_sideways(positions, normal), *_uneven(distances, affine)]
    return Arrangement(order, affine, notes, tuple(faults))


def _check_plane(plane: Plane) -> None:
    row, column = np.array(plane.orientation[:3]), np.array(plane.orientation[3:])
    errors = (np.linalg.norm(row) - 1, np.linalg.norm(column) - 1, row @ column)
    if not np.abs(errors).max() <= COSINE_TOLERANCE:  # NaN fails as well
        raise _impossible("The image orientation is not two unit vectors at a right angle.")
    if not min(plane.spacing) > 0 or not np.isfinite(plane.spacing).all():
        raise _impossible("The pixel spacing is not two positive numbers.")


def _impossible(found: str) -> InvalidGeometry:
    return InvalidGeometry(
        found,
        expected="ImagePositionPatient, ImageOrientationPatient and PixelSpacing as in DICOM PS3.3 C.7.6.2.",
        advice="Export the series again from the original.",
    )


def _spacing(distances: Distances, plane: Plane) -> tuple[float, tuple[str, ...]]:
    """Millimetres from slice to slice, of a stack that is still to be checked."""
    if len(distances) == 1:
        if plane.thickness:
            return plane.thickness, ("One single slice: its thickness stands for the distance of slices.",)
        return 1.0, ("One single slice without a stated thickness: one millimetre was assumed.",)
    spacing = float(distances[-1] - distances[0]) / (len(distances) - 1) or 1.0
    if plane.thickness and plane.thickness < GAP_SHARE * spacing:
        unseen = "what lies between was not seen"
        return spacing, (f"The slices are {plane.thickness:.2f} mm thick and {spacing:.2f} mm apart: {unseen}.",)
    return spacing, ()


def affine_of(plane: Plane, spacing: float) -> Affine:
    """Indices (column, row, slice) of a regular stack to RAS+ mm, by its first plane."""
    lps = create_affine_matrix_from_attributes(
        image_position=plane.position,
        image_orientation=plane.orientation,
        pixel_spacing=plane.spacing,
        spacing_between_slices=spacing,
    )
    return np.asarray(convert_affine_to_convention(lps, "LPS", "RAS"), dtype=np.float64)


def images_a_place(planes: Sequence[Plane]) -> IntArray:
    """How many frames of one orientation lie at each place along their normal, from its start."""
    orientation = planes[0].orientation
    normal = np.cross(orientation[:3], orientation[3:])
    return _counts(np.sort(np.array([plane.position for plane in planes]) @ normal))


def plane_name(plane: Plane) -> str:
    """The anatomical plane that a frame lies nearest to."""
    normal = np.abs(np.cross(plane.orientation[:3], plane.orientation[3:]))
    return ("sagittal", "coronal", "axial")[int(normal.argmax())] if np.isfinite(normal).all() else ""


def _counts(distances: Distances) -> IntArray:
    group = np.concatenate([[0], np.cumsum(np.diff(distances) > UNEVEN_MM)]).astype(np.int64)
    return np.asarray(np.bincount(group))


def _check_repeats(distances: Distances) -> None:
    """Several frames at one place are a time series, several echoes, or an export sent twice."""
    counts = _counts(distances)
    if counts.max() == 1:
        return
    if counts.min() == counts.max():
        where = f"each of {len(counts)} positions" if len(counts) > 1 else "one position"
        raise NotAVolume(
            f"There are {counts[0]} images at {where}: a time series, or several echoes, weightings or phases in one "
            "series.",
            expected="one image a position.",
            advice="Send the images of one time, echo and type alone.",
        )
    at = int(np.argmax(counts > 1))
    raise IrregularSlices(
        f"{int((counts > 1).sum())} of {len(counts)} positions hold more than one image: the first is position "
        f"{at + 1}, with {counts[at]} images.",
        expected="one image a position.",
        advice="Send one acquisition alone, without repeated images.",
    )


def _sideways(positions: Distances, normal: Distances) -> list[str]:
    """Whether the stack leans: each slice shifted in its own plane against the one below."""
    offsets = positions - positions[0]
    along = offsets @ normal
    shift = np.linalg.norm(offsets - along[:, None] * normal, axis=1)
    if shift.max() <= LEAN_MM:
        return []
    angle = float(np.degrees(np.arctan2(shift[-1], along[-1])))
    found = f"The slices are stacked at an angle of {angle:.1f} degrees to their normal (gantry tilt)"
    return [f"{found}: the farthest is shifted sideways by {shift.max():.1f} mm."]


def _uneven(distances: Distances, affine: Affine) -> list[str]:
    """Where neighbouring slices are not as far apart as the others, in one sentence."""
    n = len(distances)
    regular = np.linspace(distances[0], distances[-1], n)
    if np.abs(distances - regular).max() <= UNEVEN_MM:
        return []
    gaps = np.diff(distances)
    usual = float(np.median(gaps))
    steps = np.round(gaps / usual).astype(int)
    counted = f"(counted {_ENDS[str(aff2axcodes(affine)[2])]})"
    if steps.min() >= 1 and np.abs(gaps - steps * usual).max() <= 2 * UNEVEN_MM:
        return [_missing(gaps, steps, counted)]
    # Neighbours at the most unusual distance.
    at = int(np.abs(gaps - usual).argmax())
    found = f"The slices are unevenly spaced: {gaps.min():.1f} to {gaps.max():.1f} mm, mostly {usual:.1f} mm"
    return [f"{found}; {gaps[at]:.1f} mm between slices {at + 1} and {at + 2} of {n} {counted}."]


def _missing(gaps: Distances, steps: IntArray, counted: str) -> str:
    """Which slices are not there, by their number in the complete series."""
    numbers = np.concatenate([[1], 1 + np.cumsum(steps)])  # of the slices that are there
    total, at = int(numbers[-1]), int(np.argmax(steps > 1))
    before, after = int(numbers[at]), int(numbers[at + 1])
    if after - before == 2:
        who = f"Slice {before + 1} of {total} is missing"
    else:
        who = f"Slices {before + 1} to {after - 1} of {total} are missing"
    others = int((steps > 1).sum()) - 1
    more = f", and there are {others} more gaps" if others > 1 else ", and there is one more gap" if others else ""
    return f"{who}: gap of {gaps[at]:.1f} mm between {before} and {after} {counted}{more}."
